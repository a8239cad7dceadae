"""Prune vision transformers to a latency you choose (NViT, arXiv:2110.04869)."""
