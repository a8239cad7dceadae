"""Kept parts in plain torch, and scores by hooks on gradients: what the references and fallbacks of all ops share.

Pruned units are left out by index, not multiplied by zero, so on a CPU too a masked call costs what is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nvit_kernels.kept import Kept


def take(x: Tensor, kept: Kept | None, dim: int) -> Tensor:
    """The kept part of `x` along `dim`."""
    return x if kept is None else x.index_select(dim, kept.indices())


def take_bias(b: Tensor | None, kept: Kept | None) -> Tensor | None:
    """The kept part of a bias that may be absent."""
    return None if b is None else take(b, kept, 0)


def spread(x: Tensor, kept: Kept | None, dim: int) -> Tensor:
    """The inverse of `take`: kept parts back in their places, exact zeros between them."""
    if kept is None:
        return x
    shape = list(x.shape)
    shape[dim] = kept.width
    return x.new_zeros(shape).index_copy(dim, kept.indices(), x)


def on_gradient(x: Tensor, scores: Tensor | None, score: Callable[[Tensor], Tensor]) -> Tensor:
    """`x`, and at its backward `scores += score(∂x)`, summed over samples too when `scores` is a vector."""
    if scores is None or not x.requires_grad:
        return x

    def accumulate(grad: Tensor) -> None:
        part = score(grad)
        scores.add_(part.sum(0) if scores.dim() == 1 else part)

    x = x.view_as(x)  # a node of its own, so that the hook sees this use of x alone
    x.register_hook(accumulate)
    return x


def wide(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def per_sample(x: Tensor) -> Tensor:
    """Sum over all but the first and last dims, in at least float32."""
    x = wide(x)
    return x.flatten(1, -2).sum(1) if x.dim() > 2 else x
