"""Merging tokens on a GPU beside plain torch, its compiled form and ToMe's recipe, and the block that it happens in.

16 of 197 tokens in bfloat16 at the widths of DeiT-Ti, DeiT-B and ViT-L; on a CPU two images in float32. Cases of a
block time timm's own on the same tokens, so that a merge can be told as a share of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import OURS, Case, device
from benchmarks.kernels.calls import compiled, forward, fused_only, with_gradients
from nvit_kernels import functional, reference

SHAPES = {"deit_tiny": (256, 192, 3), "deit_base": (128, 768, 12), "vit_large": (128, 1024, 16)}  # images, width, heads
TOKENS, MERGED = 197, 16
CLEAR = 1e-4
"""How far apart two cosines are that every provider has in the same order."""


def unfused(x: Tensor, keys: Tensor, r: int) -> Tensor:
    """The recipe of arXiv:2210.09461, appendix D, step by step: unmerged even tokens first, then odd ones."""
    metric = F.normalize(keys.mean(1), dim=-1)
    even, odd = metric[:, 1::2], metric[:, 2::2]
    nearness, partner = (even @ odd.mT).max(-1)
    order = nearness.argsort(dim=-1, descending=True)[..., None]
    target = partner[..., None].gather(1, order[:, :r])
    width = x.shape[-1]
    from_even, into = x[:, 1::2], x[:, 2::2]
    stays = from_even.gather(1, order[:, r:].expand(-1, -1, width))
    moved = from_even.gather(1, order[:, :r].expand(-1, -1, width))
    ones = x.new_ones(len(x), into.shape[1], 1).scatter_add(1, target, x.new_ones(len(x), r, 1))
    into = into.scatter_add(1, target.expand(-1, -1, width), moved) / ones
    return torch.cat([x[:, :1], stays, into], dim=1)


def inputs(images: int, width: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, keys as a fused projection leaves them, sizes.

    Images of which two cosines that decide are nearly equal get the keys of one where none are: which tokens merge
    there would depend on rounding, and providers could not be compared.
    """
    there = device()
    images, dtype = (images, torch.bfloat16) if there.type == "cuda" else (2, torch.float32)
    torch.manual_seed(0)
    x = torch.randn(images, TOKENS, width, device=there, dtype=dtype)
    keys = torch.randn(images, TOKENS, 3, heads, width // heads, device=there, dtype=dtype).permute(2, 0, 3, 1, 4)[1]
    mean = F.normalize(keys.double().mean(1), dim=-1)[:, 1:]
    first, second = (mean[:, ::2] @ mean[:, 1::2].mT).topk(2).values.unbind(-1)
    nearest, order = first.sort(descending=True)
    clear = (first - second).gather(1, order)[:, :MERGED].amin(1) > CLEAR
    clear &= nearest[:, MERGED - 1] - nearest[:, MERGED] > CLEAR
    keys[~clear] = keys[clear][:1]
    return x, keys, torch.randint(1, 5, (images, TOKENS), device=there).float()


def ours(x, keys, sizes):
    return fused_only(lambda: functional.merge_tokens(x, keys, sizes, MERGED)[0])


def plain(x, keys, sizes):
    return reference.merge_tokens(x, keys, sizes, MERGED)[0]


def in_any_order(call: Callable[[], Tensor], compared: Callable[[], Tensor] | None = None) -> Callable[[], Tensor]:
    """`call`, compared channel by channel with values sorted over tokens, of which the recipe has another order."""

    def timed():
        return call()

    timed.comparable = lambda: (compared or call)().double().sort(1).values
    return timed


def merges(label: str, x: Tensor, keys: Tensor, sizes: Tensor) -> list[Case]:
    """A merge of tokens of size one, of any sizes, and with its gradient."""
    calls = {OURS: ours, "torch": plain, "torch.compile of torch": lambda *t: compiled(plain)(*t)}
    # In 16 bits the recipe's own cosines choose other tokens: it is compared in float32 and timed as it stands.
    wide = (x.float(), keys.float())
    made = []
    for name, counts in (("forward", None), ("forward with sizes", sizes)):
        providers = {p: in_any_order(forward(c, x, keys, counts)) for p, c in calls.items()}
        if counts is None:
            recipe = (forward(unfused, *t, MERGED) for t in ((x, keys), wide))
            providers["ToMe's recipe"] = in_any_order(*recipe)
        exact = in_any_order(forward(plain, x.double(), keys, counts)).comparable
        moved = x.nbytes + keys.nbytes + x.nbytes * (TOKENS - MERGED) // TOKENS
        made.append(Case(f"merge_tokens {name} {label}", providers, exact, bytes=moved))
    steps = {p: with_gradients(lambda x, c=c: c(x, keys, None), x) for p, c in calls.items()}
    steps["ToMe's recipe"] = with_gradients(lambda x: unfused(x, keys, MERGED), x)
    steps["ToMe's recipe"].comparable = with_gradients(lambda x: unfused(x, wide[1], MERGED), wide[0])
    exact = with_gradients(lambda x: plain(x, keys, None), x.double())
    made.append(Case(f"merge_tokens forward+backward {label}", steps, exact))
    return made


def block(label: str, x: Tensor, heads: int) -> Case:
    """timm's block on the tokens before a merge."""
    from timm.models.vision_transformer import Block

    module = Block(x.shape[-1], heads, qkv_bias=True).to(x.device).eval()
    exact = forward(module, x.float())()
    module = module.to(x.dtype)
    return Case(f"block of {label}", {"timm": forward(module, x)}, lambda: exact, error=5e-2)


def cases() -> list[Case]:
    made = []
    for name, (images, width, heads) in SHAPES.items():
        x, keys, sizes = inputs(images, width, heads)
        label = f"{name} b{len(x)}"
        made += [block(label, x, heads), *merges(label, x, keys, sizes)]
    return made
