"""Passes over images that only look: activations and gradients captured, their statistics, replay block by block."""
