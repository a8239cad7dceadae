"""What a layer declares of itself: places where its activations can be looked at, and the linear layers inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .projection import Project, Projection, is_plain

Again = tuple
"""`(function, *tensors)` that give an activation once more from tensors that the backward pass keeps anyway."""

Watch = Callable[[str, Tensor, Again | None], Tensor]
"""Called by a layer as `watch(site, activation, again)`; returns the activation, unchanged for whatever follows."""


@dataclass(frozen=True)
class Site:
    """A place in a layer where its activation can be looked at; the first dimension is the image.

    Attributes:
        axes: kind of width -> the (negative) dimension along which its units are counted, of those that leave here.
        dims: the (negative) dimensions that make up a row, dims of all heads side by side and units last.
    """

    axes: Mapping[str, int] = field(default_factory=dict)
    dims: tuple[int, ...] = (-1,)

    def rows(self, x: Tensor) -> Tensor:
        """An activation as rows `(places of all images, d)`."""
        inner = [d + x.dim() for d in self.dims]
        outer = [d for d in range(x.dim()) if d not in inner]
        return x.permute(*outer, *inner).flatten(len(outer)).flatten(0, -2)


PLAIN = Site()
"""What a layer is called with, or what it returns; no unit leaves there."""


@dataclass(frozen=True)
class LinearPart:
    """A linear layer inside a prunable one, and what is kept of it.

    Attributes:
        name: relative to the prunable layer, as `fc1`.
        end: `in` where it reads what the layer reads, `out` where it writes what the layer writes, `gate` where it
            reads what the layer reads and its output multiplies another.
        rows, cols: kept outputs and inputs, int64; None for all.
    """

    name: str
    module: nn.Linear
    end: str
    rows: Tensor | None = None
    cols: Tensor | None = None

    def project(self, bias: Tensor | None = None) -> Project:
        """What applies it: where all of it is kept the module itself, so that an adapter around it, its hooks or its
        quantised weight take effect; else its kept part.

        Args:
            bias: a vector `(out,)` of the host's own, where the module has none.
        """
        whole = self.rows is None and self.cols is None
        if bias is None:
            return self.module if whole else Projection(self.module.weight, self.module.bias, self.rows, self.cols)
        if whole and not is_plain(self.module):
            return lambda x: self.module(x) + bias
        return Projection(self.module.weight, bias, self.rows, self.cols)  # one product with a bias, as the host's

    def kept(self) -> tuple[Tensor, Tensor | None]:
        """Weight `(kept out, kept in)` and bias `(kept out,)`."""
        weight, bias = self.module.weight, self.module.bias
        weight = weight if self.rows is None else weight[self.rows]
        weight = weight if self.cols is None else weight[:, self.cols]
        return weight, bias if self.rows is None or bias is None else bias[self.rows]

    def add_(self, weight: Tensor, bias: Tensor) -> None:
        """Add to the kept part of weight and bias."""
        w = self.module.weight.data
        rows = torch.arange(w.shape[0], device=w.device) if self.rows is None else self.rows
        cols = torch.arange(w.shape[1], device=w.device) if self.cols is None else self.cols
        w[rows[:, None], cols[None, :]] += weight.to(w)
        if self.module.bias is not None:
            self.module.bias.data[rows] += bias.to(w)


@dataclass(frozen=True)
class Basis:
    """Dims of an attention's heads that may be given another basis, head by head, without changing the model.

    Attributes:
        axis: `qk_dim` or `v_dim`.
        site: where the activation in this basis is seen.
        refusal: why they cannot be turned, or None.
        constant: a constant in the activation can be made good by the bias of the layer that reads it.
    """

    axis: str
    site: str
    heads: int
    dims: int
    refusal: str | None
    constant: bool
