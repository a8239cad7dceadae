"""Alike tokens of an image merged into their weighted means."""
