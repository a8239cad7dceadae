"""LayerNorm over kept channels."""
