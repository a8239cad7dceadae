"""What all prunable layers share: layouts, axes, kept indices, and the slices of their own parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from ..spec import Slice
from . import functional


@dataclass(frozen=True)
class Layout:
    """How one dimension of a weight is made of widths, the first factor varying slowest.

    Attributes:
        axes: the axis (see `Prunable.axes`) that each factor counts units of; None for a factor that stays.
        sizes: the size of each factor.
    """

    axes: tuple[str | None, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, axis: str, size: int) -> Layout:
        return cls((axis,), (size,))

    def __len__(self) -> int:
        return math.prod(self.sizes)

    def keep(self, keeps: Mapping[str, Tensor]) -> Tensor:
        """What stays of the whole dimension, bool `(len(self),)`, given a keep per axis."""
        factors = [_every(n) if a is None else keeps[a].cpu() for a, n in zip(self.axes, self.sizes, strict=True)]
        return reduce(lambda a, b: (a[:, None] & b[None, :]).flatten(), factors)

    def resized(self, keeps: Mapping[str, Tensor]) -> Layout:
        """The layout of what `keep` leaves."""
        sizes = (n if a is None else int(keeps[a].sum()) for a, n in zip(self.axes, self.sizes, strict=True))
        return Layout(self.axes, tuple(sizes))


def _every(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.bool)


def index(keep: Tensor) -> Tensor | None:
    """Kept positions of a bool vector; None where all are kept, so that a dense layer gathers nothing."""
    return None if bool(keep.all()) else keep.nonzero().squeeze(1)


def dim_slices(
    name: str, shape: tuple[int, ...], dim: int, layout: Layout, rows: tuple[int, int] | None = None
) -> Iterator[tuple[str, Slice]]:
    """`(axis, slice)` for each factor of the layout of one dimension of a parameter.

    Args:
        shape: of the parameter, or of its `rows`.
    """
    view = (*shape[:dim], *layout.sizes, *shape[dim + 1 :])
    for place, axis in enumerate(layout.axes, start=dim):
        if axis is not None:
            yield axis, Slice(name, view, place, rows)


class Prunable(nn.Module):
    """Base of the layers of this package.

    Attributes:
        axes: axis -> name of the group that prunes it here. An axis is a kind of width; a layer that writes another
            residual stream than it reads has an axis `emb_out` as well.
        tap: see `nvit.functional`; set while gate gradients are read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.axes: dict[str, str] = {}
        self.tap: functional.Tap | None = None
        self._indices: set[str] = set()

    def adopt(self, host: nn.Module) -> None:
        """Take over a host layer's parameters and the children that hold some, by name and in order."""
        for name, p in host.named_parameters(recurse=False):
            self.register_parameter(name, p)
        for name, child in host.named_children():
            if next(child.parameters(), None) is not None:
                self.add_module(name, child)

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        """Restrict the forward pass to kept units; `keeps[axis]` is a bool vector over the dense width."""
        raise AssertionError(f"{type(self).__name__} does not say what it keeps")

    def keep_all_(self) -> None:
        """Forget all masks: every index becomes None."""
        for name in self._indices:
            setattr(self, name, None)

    def resize_(self, keeps: Mapping[str, Tensor]) -> None:
        """Declare new dense widths, after the weights were cut to `keeps` (bool over the old widths)."""
        self.keep_all_()

    def slices(self) -> Iterator[tuple[str, Slice]]:
        """`(axis, slice)` for every part of the layer's own parameters, or of plain linear layers in it, that shrinks
        along an axis; names are relative to the layer. Prunable layers inside it declare their own."""
        raise AssertionError(f"{type(self).__name__} does not declare its slices")

    def span(self, axis: str) -> int:
        """Dims that one unit of an axis stands for: 2 for a rotary pair."""
        return 1

    def _constant(self, name: str, values: Tensor) -> None:
        """A buffer that follows the layer's device and is not saved."""
        self.register_buffer(name, values, persistent=False)

    def _index(self, name: str, kept: Tensor | None) -> None:
        """A kept index, None for all; it comes and goes with the masks."""
        self._indices.add(name)
        p = next(self.parameters(), None)
        self.register_buffer(name, kept if kept is None or p is None else kept.to(p.device), persistent=False)


def prunable_layers(model: nn.Module) -> dict[str, Prunable]:
    """Every prunable layer of a prepared model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Prunable)}


def keep_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Let every layer of a prepared model compute over the units that `masks` keeps (bool per group)."""
    for layer in prunable_layers(model).values():
        layer.keep_({axis: masks[group] for axis, group in layer.axes.items()})
