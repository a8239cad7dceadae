"""Attention over kept heads and dims."""
