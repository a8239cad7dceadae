"""The gated MLP over kept hidden units."""
