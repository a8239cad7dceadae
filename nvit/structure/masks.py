"""Masks (a keep per group), the same choice weight by weight, and zeros where weights are pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import adapters
from ..layers import keep_
from ..spec import BlockWidths, Group, Slice, block_widths

Masks = dict[str, Tensor]
"""Group name -> bool `(group.size,)`, True stays."""


WeightMasks = dict[str, tuple[Tensor | None, ...]]
"""Parameter name -> for each dimension a bool vector of what stays, None where all of it does."""


def full_masks(groups: Sequence[Group]) -> Masks:
    """Masks that keep everything."""
    return {g.name: torch.ones(g.size, dtype=torch.bool) for g in groups}


def check_masks(groups: Sequence[Group], masks: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless `masks` fits this model and leaves something of every group, or nothing of what may end
    with all that ends with it."""
    ended = {name for g in groups if g.ends is not None and _empty(masks, g.name) for name in (g.name, *g.ends)}
    for g in groups:
        keep = masks.get(g.name)
        if keep is None:
            raise ValueError(f"{g.name}: no mask for this group; found masks for {len(masks)} groups of {len(groups)}")
        if keep.numel() != g.size:
            raise ValueError(
                f"{g.name}: mask has {keep.numel()} entries but this model has {g.size} units there. "
                "A mask fits only the model it was made for; compare the two runs' spec.json."
            )
        if bool(keep.any()) and g.name in ended:
            raise ValueError(
                f"{g.name}: mask keeps units of an attention without heads; queries, keys and values end with them"
            )
        if not bool(keep.any()) and g.name not in ended:
            raise ValueError(f"{g.name}: mask keeps nothing; at least one unit of this group must stay")


def _empty(masks: Mapping[str, Tensor], name: str) -> bool:
    return name in masks and not bool(masks[name].any())


def kept_counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: int(keep.sum()) for name, keep in masks.items()}


def widths(groups: Sequence[Group], masks: Mapping[str, Tensor]) -> tuple[BlockWidths, ...]:
    """Widths of every block under these masks."""
    return block_widths(groups, kept_counts(masks))


def _spread(s: Slice, shape: Sequence[int], keep: Tensor) -> tuple[int, Tensor]:
    """The parameter dimension a slice's axis lies in, and `keep` repeated over that dimension."""
    sizes = list(shape)
    if s.rows is not None:
        sizes[0] = s.rows[1] - s.rows[0]
    dim = stop = -1
    while s.axis >= stop:
        dim, start, stop = dim + 1, max(stop, 0), max(stop, 0) + 1
        while math.prod(s.view[start:stop]) < sizes[dim]:
            stop += 1
        assert math.prod(s.view[start:stop]) == sizes[dim], f"{s.name}: view {s.view} does not split {tuple(sizes)}"
    factors = s.view[start:stop]
    ones = [1] * len(factors)
    ones[s.axis - start] = -1
    return dim, keep.view(ones).expand(factors).flatten()


def weight_masks(params: Mapping[str, Tensor], groups: Sequence[Group], masks: Mapping[str, Tensor]) -> WeightMasks:
    """The choice of `masks`, weight by weight. Groups that share a parameter intersect: each keeps a part of it.

    Parameters that nothing was pruned from are absent.
    """
    found: dict[str, list[Tensor | None]] = {}
    for g in groups:
        keep = masks[g.name]
        if bool(keep.all()):
            continue
        for s in g.slices:
            shape = params[s.name].shape
            dims = found.setdefault(s.name, [None] * len(shape))
            dim, part = _spread(s, shape, keep)
            if s.rows is not None and s.rows != (0, shape[0]) and dim == 0:
                part, whole = torch.ones(shape[0], dtype=torch.bool), part
                part[s.rows[0] : s.rows[1]] = whole
            dims[dim] = part if dims[dim] is None else dims[dim] & part
    return {name: tuple(dims) for name, dims in found.items()}


class Projection:
    """Zeroing what was pruned, with everything that can be known beforehand on the parameters' devices: applying it
    reads nothing back.

    Args:
        params: of which only devices and shapes are read.
    """

    def __init__(self, params: Mapping[str, Tensor], weights: WeightMasks) -> None:
        self.rows: list[tuple[str, Tensor]] = []
        self.columns: list[tuple[str, Tensor]] = []
        for name, dims in weights.items():
            p = params[name]
            for dim, keep in enumerate(dims):
                if keep is None:
                    continue
                if dim == 0:
                    self.rows.append((name, (~keep).nonzero().squeeze(1).to(p.device)))
                else:  # columns lie scattered: one pass over the parameter is faster than filling them
                    shape = [-1 if d == dim else 1 for d in range(p.dim())]
                    self.columns.append((name, keep.view(shape).to(p.device)))

    @torch.no_grad()
    def __call__(self, params: Mapping[str, Tensor]) -> None:
        """Zero what was pruned, in place."""
        for name, gone in self.rows:
            params[name].index_fill_(0, gone, 0)
        for name, keep in self.columns:
            params[name].mul_(keep)


def project_(params: Mapping[str, Tensor], weights: WeightMasks) -> None:
    """Zero what was pruned, in place, once; see `Projection` for doing it after every step."""
    Projection(params, weights)(params)


def apply_(
    model: nn.Module, groups: Sequence[Group], masks: Mapping[str, Tensor], project: Callable = project_
) -> WeightMasks:
    """Mask a prepared model in place: layers compute over kept units, pruned weights become zero (by `project`). The
    model carries its masks as `masks`, so that whoever saves it knows (`masks_of`); as bytes, since they are no tensors
    of its own that a copy or a rehearsal of it would have to deal with."""
    check_masks(groups, masks)
    params = dict(model.named_parameters())
    weights = weight_masks(params, groups, masks)
    project(params, weights)
    keep_(model, masks)
    model.masks = {name: keep.cpu().numpy().tobytes() for name, keep in masks.items()}
    return weights


def masks_of(model: nn.Module) -> Masks | None:
    """What a masked model keeps, as `apply_` was told; None of a dense or compact one."""
    said = getattr(model, "masks", None) or {}
    masks = {name: torch.frombuffer(bytearray(keep), dtype=torch.bool) for name, keep in said.items()}
    return None if all(bool(keep.all()) for keep in masks.values()) else masks


def unmasked_(model: nn.Module) -> nn.Module:
    """Let a masked model compute over all units again, at the dense model's cost. What was pruned stays zero, so that
    its outputs are neither the dense model's nor the masked one's."""
    keep_(model, full_masks(adapters.find(model).groups(model)))
    model.masks = None
    return model
