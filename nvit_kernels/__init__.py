"""Fused kernels for vision transformers. Needs torch and triton alone; never imports nvit."""
