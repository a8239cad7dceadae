"""From a spec to the compact model it stands for: its structure on the meta device, then its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import adapters
from ..layers.merging import counts
from ..spec import BlockWidths, Group, ViTSpec
from .compact import cut
from .masks import Masks, check_masks, full_masks, weight_masks, widths

_MOST = 2**20
"""Of any number in a spec's config, and of units in a group."""

_MOST_TOKENS, _MOST_PLACES = 2**16, 2**28
"""Of the dense model: position tables have a number for every channel of every token, or for every two tokens."""


def skeleton(spec: ViTSpec) -> nn.Module:
    """The prepared compact model of a spec on the meta device: its structure, no weights.

    Raises:
        ValueError: a family, argument or change that this version does not know, widths that do not fit, or sizes
            beyond any model's; nothing was allocated for these.
    """
    check_sizes(spec)
    return narrow_(adapters.build(spec), spec)


def narrow_(model: nn.Module, spec: ViTSpec) -> nn.Module:
    """Cut the prepared dense model of a spec to the spec's widths, in place; returns it.

    Raises:
        ValueError: as `skeleton`.
    """
    adapters.change_(model, spec.changes)
    family_of(spec).merge_(model, spec.merges)
    groups, masks = kept(spec, model)
    params = dict(model.named_parameters())
    family_of(spec).resize(model, cut(params, weight_masks(params, groups, masks)), masks)
    model.sparse24, model.class_names = spec.sparse, spec.labels
    return model


def dense_blocks(spec: ViTSpec) -> tuple[BlockWidths, ...]:
    """Widths of the dense model that a spec's model was cut from.

    Raises:
        ValueError: as `skeleton`.
    """
    check_sizes(spec)
    groups = family_of(spec).groups(adapters.build(spec))
    return widths(groups, full_masks(groups))


def tokens_by_block(spec: ViTSpec) -> list[int]:
    """Tokens that enter the first block of a spec's model, and those that leave each; none of a hierarchical model,
    where every stage has its own.

    Raises:
        ValueError: as `skeleton`.
    """
    check_sizes(spec)
    if "depths" in spec.config:
        return []
    return counts(family_of(spec).tokens(adapters.build(spec)), spec.merges or (0,) * len(spec.blocks))


def filled(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A skeleton with these weights, which it shares, in eval mode; their names and shapes have to be its own. Its
    tables (rotary angles, position biases' indices) get the device of the weights, and their dtype if they have one."""
    adapter = adapters.of(model)
    adapter.resize(model, weights, full_masks(adapter.groups(model)))
    dtypes = {w.dtype for w in weights.values() if w.is_floating_point()}
    return model.eval().to(*dtypes) if len(dtypes) == 1 else model.eval()


def family_of(spec: ViTSpec) -> adapters.Adapter:
    """The adapter of a spec's family.

    Raises:
        ValueError: this version does not know it.
    """
    if spec.family not in adapters.FAMILIES:
        raise ValueError(f"family {spec.family!r} is unknown; this version knows {', '.join(adapters.FAMILIES)}")
    return adapters.FAMILIES[spec.family]


def kept(spec: ViTSpec, model: nn.Module) -> tuple[list[Group], Masks]:
    """Masks on a spec's dense model that leave as many units of every group as the spec says: the ones it lists, or
    the first."""
    groups = adapters.FAMILIES[spec.family].groups(model)
    depth = 1 + max(b for g in groups for b in g.blocks)
    if len(spec.blocks) != depth:
        raise ValueError(f"it lists {len(spec.blocks)} blocks for a model of {depth}")
    masks = {}
    for g in groups:
        found = {getattr(spec.blocks[b], g.kind) for b in g.blocks}
        if len(found) > 1 or max(found) > min(g.size, _MOST):
            raise ValueError(f"{g.name} has widths {sorted(found)[:4]}; one width of at most {g.size} was expected")
        if g.size > 16 * _MOST:
            raise ValueError(f"{g.name} has {g.size} units in the dense model, which is beyond any model's")
        width = found.pop()
        units = spec.kept.get(g.name, range(width))
        if len(units) != width or not all(type(u) is int and 0 <= u < g.size for u in units):
            raise ValueError(f"{g.name} keeps the units {list(units)[:4]} …; {width} of {g.size} were expected")
        masks[g.name] = torch.zeros(g.size, dtype=torch.bool).index_fill_(
            0, torch.tensor(units, dtype=torch.long), True
        )
        if int(masks[g.name].sum()) != width:
            raise ValueError(f"{g.name} keeps a unit twice; {width} of {g.size} were expected")
    check_masks(groups, masks)
    return groups, masks


def check_sizes(spec: ViTSpec) -> None:
    """Raise ValueError where a spec asks for a model larger than any, before any of it is built."""
    count = 0
    todo: list[Any] = [dict(spec.config), dict(spec.preprocess)]
    while todo:
        value, count = todo.pop(), count + 1
        if isinstance(value, (Mapping, Sequence)) and not isinstance(value, str):
            todo.extend(value.values() if isinstance(value, Mapping) else value)
        if isinstance(value, (int, float)) and not (math.isfinite(value) and abs(value) <= _MOST):
            raise ValueError(f"it holds the number {str(value)[:20]}, which is beyond any model's")
    blocks, tokens, channels = family_of(spec).extent(spec.config)
    if blocks and blocks != len(spec.blocks):
        raise ValueError(f"it lists {len(spec.blocks)} blocks for a model of {blocks}")
    if tokens > _MOST_TOKENS or tokens * max(channels, 1) > _MOST_PLACES:
        raise ValueError(f"it asks for {tokens} tokens of {channels} channels, which is beyond any model's")
