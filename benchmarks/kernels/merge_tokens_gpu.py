"""Merging tokens on a GPU beside plain torch, its compiled form and ToMe's recipe, and the block that it happens in.

python -m benchmarks.kernels merge_tokens

16 of 197 tokens in bfloat16 at the widths of DeiT-Ti, DeiT-B and ViT-L. The rows `block of …` time timm's Block on the
same tokens; what a merge adds to it is the share that `benchmarks.gpu` prints.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, device
from benchmarks.kernels.calls import compiled, fused_only
from benchmarks.kernels.merge_recipe import unfused
from nvit_kernels import functional, reference

SHAPES = {"deit_tiny": (256, 192, 3), "deit_base": (128, 768, 12), "vit_large": (128, 1024, 16)}  # images, width, heads
TOKENS, MERGED, PREFIX = 197, 16, 1
BLOCK, MERGE = "block of ", "merge_tokens forward "
"""How cases begin that are set against each other, with the same words behind."""


def plain(x, keys, sizes):
    return reference.merge_tokens(x, keys, sizes, MERGED, PREFIX)


def ours(x, keys, sizes):
    return fused_only(lambda: functional.merge_tokens(x, keys, sizes, MERGED, PREFIX))


def inputs(images: int, width: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, keys as a fused projection leaves them, sizes."""
    there = device()
    gpu = there.type == "cuda"
    images, dtype = (images, torch.bfloat16) if gpu else (2, torch.float32)
    torch.manual_seed(0)
    x = torch.randn(images, TOKENS, width, device=there, dtype=dtype)
    qkv = torch.randn(images, TOKENS, 3, heads, width // heads, device=there, dtype=dtype)
    return x, qkv.permute(2, 0, 3, 1, 4)[1], torch.randint(1, 5, (images, TOKENS), device=there).float()


def result(merged: tuple[Tensor, Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """What a merge is compared by: every token as the mean that it went into, and how many are in that.

    Not by the places, which differ where two cosines are one rounding apart.
    """
    y, total, place = merged
    return reference.unmerge_tokens(y, place), total.gather(1, place)


def forward(call: Callable, *tensors) -> Callable[[], Tensor]:
    def run():
        with torch.no_grad():
            return call(*tensors)[0]

    return run


