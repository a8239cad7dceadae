"""Rotary position embedding over kept pairs of dims."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: dims come in pairs that turn by an angle of the token's place.

    Attributes:
        sin, cos: `(tokens, dims)` or, where heads turn by angles of their own, `(heads, tokens, dims)` or anything else
            broadcastable to `(batch, heads, tokens, dims)`; alike for both of a pair.
        prefix: so many tokens at the front have no place.
    """

    sin: Tensor
    cos: Tensor
    prefix: int = 0

    def of(self, dims: Tensor | None, heads: Tensor | None = None) -> Rotary:
        """The same for kept dims and kept heads; None keeps all."""
        return Rotary(*(_kept_angles(t, dims, heads) for t in (self.sin, self.cos)), self.prefix)

    def __call__(self, x: Tensor, pairs: str) -> Tensor:
        """Turn `x` `(batch, heads, tokens, dims)`; pairs are `interleaved` (neighbours) or `half` a head apart."""
        still, x = x[..., : self.prefix, :], x[..., self.prefix :, :]
        if pairs == "half":
            first, second = x.chunk(2, dim=-1)
            turned = torch.cat([-second, first], dim=-1)
        else:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return torch.cat([still, (x * self.cos + turned * self.sin).to(x.dtype)], dim=-2)


def _kept_angles(table: Tensor, dims: Tensor | None, heads: Tensor | None) -> Tensor:
    table = table if dims is None else table.index_select(-1, dims)
    return table if heads is None else table.index_select(-3, heads)
