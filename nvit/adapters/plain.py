"""What the latency tables of all models with one residual stream and equal blocks have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..spec import KINDS, BlockWidths, Part, ViTSpec


def parts(depth: int) -> tuple[Part, ...]:
    """The attention and the MLP of every block, each with its norm and residual, and the rest of the model."""
    every = range(depth)
    return (
        Part("attention", ("emb", "heads", "qk_dim", "v_dim"), tuple((i,) * 4 for i in every)),
        Part("mlp", ("emb", "mlp"), tuple((i, i) for i in every)),
        Part("rest", ("emb",), ((0,),)),
    )


def attention_macs(tokens: int) -> Callable[[int, int, int, int], int]:
    """Multiply-accumulates an image of an attention by its emb, heads, qk_dim and v_dim."""
    return lambda emb, heads, qk, v: tokens * heads * (emb * (2 * qk + v) + v * emb + tokens * (qk + v))


def mlp_macs(tokens: int, matrices: int) -> Callable[[int, int], int]:
    """Multiply-accumulates an image of an MLP of two matrices, or with a gate three, by its emb and hidden width."""
    return lambda emb, hidden: tokens * matrices * emb * hidden


def sample_spec(spec: ViTSpec, part: Part, widths: Sequence[int], **config: Any) -> ViTSpec:
    """One block that has `widths` along the axes of `part`, and elsewhere the widest of the model.

    Args:
        config: what makes the host one block deep.
    """
    widest = BlockWidths(**{kind: max(getattr(b, kind) for b in spec.blocks) for kind in KINDS})
    block = replace(widest, **dict(zip(part.kinds, widths, strict=True)))
    return replace(spec, config={**spec.config, **config}, blocks=(block,))
