"""Attention over short rows, at most 208 tokens: a program per image and head."""

from nvit_kernels.ops.attention_short.op import attention_short, attention_short_packed, takes

__all__ = ["attention_short", "attention_short_packed", "takes"]
