"""What all prunable layers share: layouts, axes, kept indices, and the slices of their own parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import Slice
from .sites import PLAIN, Again, Basis, LinearPart, Site, Watch


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
        places: axis -> the dense model's units that are left, of the axes where it matters which.
        reads_only: it reads a stream and writes none, as a classifier does.
        pools: it makes one token of all of the stream's.
    """

    reads_only = False
    pools = False

    def __init__(self) -> None:
        nn.Module.__init__(self)  # a subclass may be an nn.Linear as well, whose parameters are the host's
        self.axes: dict[str, str] = {}
        self.places: dict[str, tuple[int, ...]] = {}
        self._indices: set[str] = set()
        self._watches: dict[str, list[Callable[[Tensor, Again | None], Tensor]]] = {}

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

    @property
    def follows_stream(self) -> bool:
        """Whether it reads what the stream ends in."""
        return self.reads_only or self.pools

    def ended(self, keeps: Mapping[str, Tensor]) -> bool:
        """Whether `keeps` (as `keep_` takes them) leave none of the units without which it is a constant."""
        return False

    def release_(self) -> None:
        """Be of no width any more, in a dense model: what it reads stays as wide as it is."""
        self.axes, self.places = {}, {}

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

    def sites(self) -> dict[str, Site]:
        """Where its activations can be looked at, by name: `out` (where units leave before the last linear layer), `qk`
        (queries as the keys meet them), `maps` (the softmax of attention; only looked at, so it has no gradient), `emb`
        (the stream as it is read). Every layer has `in`, what it is called with, and `end`, what it returns."""
        return {"in": PLAIN, "end": PLAIN}

    def linears(self) -> list[LinearPart]:
        """The linear layers inside it that read or write along an axis."""
        return []

    def bases(self) -> list[Basis]:
        """Dims that may be given another basis; `turn_` does it."""
        return []

    def reorderable(self) -> tuple[LinearPart, str, int | None] | None:
        """The linear layer whose inputs may come in another order, their axis, and the length of the spans inside which
        they may (None for all of them); None where there is none."""
        return None

    def watch(self, site: str, callback: Callable[[Tensor, Again | None], Tensor]) -> Callable[[], None]:
        """Have `callback(activation, again)` see a site from now on; several may, each gets what the last returned.

        Returns:
            A function that takes it off again.

        Raises:
            ValueError: the layer has no such site.
        """
        if site not in self.sites():
            raise ValueError(f"{type(self).__name__} has no site {site!r}; it has {', '.join(self.sites())}")
        watches = self._watches.setdefault(site, [])
        if site == "in" and not watches:
            self.register_forward_pre_hook(_enter, with_kwargs=True)
        if site == "end" and not watches:
            self.register_forward_hook(_end)
        watches.append(callback)

        def leave() -> None:
            watches.remove(callback)
            if not watches:
                self._drop(site)

        return leave

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: one of a layer under observation (a twin in shards, a moving average) is not under observation."""
        state = self.__dict__ | {"_watches": {}}
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = state[kind]
            state[kind] = type(hooks)((key, hook) for key, hook in hooks.items() if hook not in CAPTURES)
        return state

    def unwatch_(self) -> None:
        """Forget whoever watches."""
        for site in list(self._watches):
            self._drop(site)

    def _drop(self, site: str) -> None:
        self._watches.pop(site, None)
        for hooks, ours in ((self._forward_pre_hooks, _enter), (self._forward_hooks, _end)):
            if site == ("in" if ours is _enter else "end"):
                for key in [key for key, hook in hooks.items() if hook is ours]:
                    del hooks[key]

    def watched(self, site: str, x: Tensor, again: Again | None = None) -> Tensor:
        """An activation on its way past a site: whoever watches there sees it."""
        for callback in self._watches.get(site, ()):
            x = callback(x, again)
        return x

    def _watch(self) -> Watch | None:
        """`watched` where somebody watches a place inside, else None."""
        return self.watched if self._watches.keys() - {"in", "end"} else None

    def _constant(self, name: str, values: Tensor) -> None:
        """A buffer that follows the layer's device and is not saved."""
        self.register_buffer(name, values, persistent=False)

    def _index(self, name: str, kept: Tensor | None) -> None:
        """A kept index, None for all; it comes and goes with the masks."""
        self._indices.add(name)
        p = next(self.parameters(), None)
        self.register_buffer(name, kept if kept is None or p is None else kept.to(p.device), persistent=False)

    @property
    def masked(self) -> bool:
        """Whether it computes over a part of its dense weights."""
        return any(getattr(self, name) is not None for name in self._indices)

    def indices_to_(self, device: torch.device) -> None:
        """Move the kept indices to a device."""
        for name in self._indices:
            kept = getattr(self, name)
            setattr(self, name, kept if kept is None else kept.to(device))


def _enter(layer: Prunable, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of a layer whose site `in` is watched; some hosts give their layers all arguments by name."""
    if args:
        return (layer.watched("in", args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, kwargs | {name: layer.watched("in", kwargs[name])}


def _end(layer: Prunable, args: tuple, out: Tensor | tuple) -> Tensor | tuple:
    """Forward hook of a layer whose site `end` is watched: of several outputs, the first is what it computes."""
    return layer.watched("end", out) if isinstance(out, Tensor) else (layer.watched("end", out[0]), *out[1:])


CAPTURES = (_enter, _end)
"""Hooks that our own captures put on a layer."""


def prunable_layers(model: nn.Module) -> dict[str, Prunable]:
    """Every prunable layer of a prepared model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Prunable)}


def keep_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Let every layer of a prepared model compute over the units that `masks` keeps (bool per group)."""
    device = next(model.parameters()).device
    for layer in prunable_layers(model).values():
        layer.keep_({axis: masks[group] for axis, group in layer.axes.items()})
        if next(layer.parameters(), None) is None:  # the stream's entry does not know where the model is
            layer.indices_to_(device)
