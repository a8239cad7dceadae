"""How a linear layer is applied: its kept part gathered from dense weights, or as a module that is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Project = Callable[[Tensor], Tensor]
"""Applies a linear layer, `(..., in) -> (..., out)`: a `Projection`, or a module, with all that wraps or hooks it."""


class _Take(torch.autograd.Function):
    """`weight[rows][:, cols]`. Its backward fills one zeroed dense gradient, where two index_select would fill two."""

    @staticmethod
    def forward(ctx, weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, cols)
        ctx.shape = weight.shape
        part = weight if rows is None else weight.index_select(0, rows)
        return part if cols is None else part.index_select(1, cols)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, cols = ctx.saved_tensors
        if cols is not None:
            wide = grad.new_zeros(grad.shape[0], ctx.shape[1])
            grad = wide.index_copy_(1, cols, grad)
        if rows is not None:
            grad = grad.new_zeros(ctx.shape).index_copy_(0, rows, grad)
        return grad, None, None


def take(weight: Tensor, rows: Tensor | None = None, cols: Tensor | None = None) -> Tensor:
    """The kept part of a matrix `(out, in)` or, without `cols`, of a vector `(out,)`."""
    if rows is None and cols is None:
        return weight
    if weight.dim() == 1:
        return weight.index_select(0, rows)
    return _Take.apply(weight, rows, cols)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None, cols: Tensor | None = None
) -> Tensor:
    """`F.linear` over kept outputs (`rows`) and kept inputs (`cols`): `(..., kept in) -> (..., kept out)`."""
    return F.linear(x, take(weight, rows, cols), None if bias is None else take(bias, rows))


@dataclass(frozen=True)
class Projection:
    """`linear` by dense weights: `(..., kept in) -> (..., kept out)`.

    Attributes:
        weight, bias: `(out, in)` and `(out,)`.
        rows, cols: kept outputs and inputs, int64; None for all.
    """

    weight: Tensor
    bias: Tensor | None = None
    rows: Tensor | None = None
    cols: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.rows, self.cols)

    @property
    def shape(self) -> tuple[int, int]:
        """Kept outputs and inputs."""
        out, into = self.weight.shape
        return (out if self.rows is None else len(self.rows), into if self.cols is None else len(self.cols))

    def kept(self) -> tuple[Tensor, Tensor | None]:
        """Weight `(kept out, kept in)` and bias `(kept out,)`, gathered."""
        bias = None if self.bias is None else take(self.bias, self.rows)
        return take(self.weight, self.rows, self.cols), bias


HOOKS = {
    "forward hook": "_forward_hooks",
    "forward pre-hook": "_forward_pre_hooks",
    "backward hook": "_backward_hooks",
    "backward pre-hook": "_backward_pre_hooks",
}
"""Where torch keeps the hooks of a module, by kind."""


def hooks(module: nn.Module) -> list[tuple[str, Callable]]:
    """What a module's call runs besides its class's forward: kind and function."""
    found = [(kind, hook) for kind, name in HOOKS.items() for hook in getattr(module, name).values()]
    return found + ([("forward of its own", module.forward)] if "forward" in vars(module) else [])


def is_plain(module: nn.Module) -> bool:
    """Whether a module's weight and bias say all that its call does: nn.Linear itself, with nothing around it."""
    return type(module) is nn.Linear and type(module.weight) in (nn.Parameter, Tensor) and not hooks(module)


def as_tensors(project: Project) -> Projection | None:
    """A projection in plain tensors, for a fused kernel; None of a module that has to be called."""
    if isinstance(project, Projection):
        return project
    return Projection(project.weight, project.bias) if is_plain(project) else None
