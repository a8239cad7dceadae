"""Other ways to narrow a model to a measured latency: uniform widths, ReViT's rule, Torch-Pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.engine.torch_pruning_vit import narrowed
from nvit import adapters
from nvit.latency.spread import Ratio
from nvit.latency.table import LatencyTable
from nvit.prune.aim import Aim
from nvit.spec import BUNDLE_SIZES, BlockWidths, Group
from nvit.structure.compact import compact
from nvit.structure.masks import Masks, apply_, full_masks, widths
from nvit.zoo import REVIT, Rule

Clock = Callable[[nn.Module], Ratio] | None
"""Measures a model against the dense one, see `nvit.prune.timing`; None: the table's word, or that of MACs."""

STEP = {"emb": 8, "heads": 1, "qk_dim": 4, "v_dim": 4, "mlp": 16}
"""What uniform widths are rounded to; none is narrower than one of nvit's bundles, where the latency table begins."""

ALIGNED = 8
"""What all widths are multiples of on a GPU: 16-bit products of others are slow, and a peer should not pay for that."""


def kept(groups: Sequence[Group], scores: Mapping[str, Tensor], blocks: Sequence[BlockWidths]) -> Masks:
    """Masks that leave these widths, the units with the highest scores of every group; a width above the model's own
    stays as it is."""
    masks = full_masks(groups)
    for g in groups:
        left = min(g.size, getattr(blocks[g.blocks[0]], g.kind))
        masks[g.name][scores[g.name].argsort(stable=True)[: g.size - left]] = False
    return masks


def uniform(dense: Sequence[BlockWidths], share: float, aligned: int = 1) -> tuple[BlockWidths, ...]:
    """As large a share of every width, a multiple of `aligned`; heads stay, of which DeiT-Ti has three."""

    def part(kind: str, width: int) -> int:
        step = max(STEP[kind], aligned)
        return width if kind == "heads" else min(width, max(BUNDLE_SIZES[kind], round(share * width / step) * step))

    return tuple(BlockWidths(**{kind: part(kind, getattr(b, kind)) for kind in STEP}) for b in dense)


def ruled(dense: Sequence[BlockWidths], emb: int, rule: Rule = REVIT) -> tuple[BlockWidths, ...]:
    """A rule's widths at this stream, no wider than the model is."""
    asked = rule.widths(emb, len(dense))
    return tuple(
        BlockWidths(**{kind: min(getattr(a, kind), getattr(b, kind)) for kind in STEP})
        for a, b in zip(asked, dense, strict=True)
    )


def family(of: str, dense: Sequence[BlockWidths], aligned: int = 1) -> list[tuple[BlockWidths, ...]]:
    """Widths from wide to narrow, `uniform` or `revit`; the latter's are multiples of 8 as they are."""
    if of == "uniform":
        return [uniform(dense, share / 100, aligned) for share in range(100, 9, -1)]
    return [ruled(dense, emb) for emb in range(dense[0].emb, 15, -STEP["emb"])]


def aligned_on(device: torch.device) -> int:
    """What widths should be multiples of on a device."""
    return ALIGNED if device.type == "cuda" else 1


def shaped(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    table: LatencyTable,
    clock: Clock,
    of: str,
    target: float,
) -> nn.Module:
    """The dense model, prepared and left as it is, cut to the widths of a family that come nearest to a latency."""
    groups = adapters.find(model).groups(model)
    every = family(of, widths(groups, full_masks(groups)), aligned_on(next(model.parameters()).device))
    ratios = [table.ratio(widths(groups, kept(groups, scores, blocks))) for blocks in every]

    def choose(ratio: float) -> tuple[float, Masks]:
        at = min(range(len(every)), key=lambda i: abs(ratios[i] - ratio))
        return ratios[at], kept(groups, scores, every[at])

    def build(masks: Masks) -> nn.Module:
        masked = copy.deepcopy(model)
        apply_(masked, groups, masks)
        return compact(masked, groups, masks)

    return build(Aim(clock).hit(target, choose, build)[0])


def with_gradients(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> nn.Module:
    """The model with the gradients of cross entropy at true labels, mean over batches."""
    model.zero_grad()
    for x, y in batches:
        (F.cross_entropy(model(x), y) / len(batches)).backward()
    return model


def by_torch_pruning(
    dense: nn.Module, theirs: nn.Module, clock: Clock, target: float, size: int, **options: Any
) -> nn.Module:
    """What Torch-Pruning's Taylor importance leaves at a measured latency, as a model that nvit saves and trains.

    Args:
        dense: prepared by nvit; what the snapshot is narrower than.
        theirs: the same as timm's own model, with gradients, on the CPU.
        options: of Torch-Pruning's pruner, as `isomorphic`.
    """
    import torch_pruning as tp

    device, known = next(dense.parameters()).device, {}
    options |= {"input_size": (3, size, size), "bisections": 7, "known": known}
    if (aligned := aligned_on(device)) > 1:
        options |= {"round_to": aligned}

    def choose(ratio: float) -> tuple[float, nn.Module]:
        small, share = narrowed(theirs, ratio, tp.importance.GroupTaylorImportance(), **options)
        return share, adopted(small, dense).to(device)

    return Aim(clock).hit(target, choose, lambda small: small)[0]


def adopted(small: nn.Module, dense: nn.Module) -> nn.Module:
    """A narrow timm model, prepared, that says of itself what dense model it was cut from."""
    small = copy.deepcopy(small)
    adapters.find(dense).prepare(small)
    small.dense_config = copy.deepcopy(dense.dense_config)
    for p in small.parameters():
        p.grad = None
    return small.eval().requires_grad_(True)
