"""Tokens merged down to a share of the work: a schedule of each family costs that much, and the calibration images say
which of them keeps the model's answers best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import adapters
from ..selection.schedules import FAMILIES, Merges, weakest
from ..structure.compact import meta_copy
from ..structure.masks import full_masks, widths
from ..structure.verify import evaluating


def work_of(model: nn.Module) -> Callable[[Merges], int]:
    """Multiply-accumulates of an image as a function of how many tokens merge in each block; the model, dense or
    compact, stays as it is."""
    adapter = adapters.find(model)
    skeleton = adapter.prepare(meta_copy(model))
    groups = adapter.groups(skeleton)
    blocks = widths(groups, full_masks(groups))

    def work(merges: Merges) -> int:
        adapter.merge_(skeleton, merges)
        total = 0
        for part in adapter.parts(skeleton):
            macs = adapter.part_macs(skeleton, part)
            for piece in part.pieces:
                total += macs(*(getattr(blocks[b], kind) for b, kind in zip(piece, part.kinds, strict=True)))
        return total

    return work


@torch.no_grad()
def merge_to(
    model: nn.Module, target: float, batches: Sequence[Tensor], *, dense: nn.Module | None = None
) -> dict[str, Any]:
    """Let tokens of a model merge, in place, until it takes a share of the multiply-accumulates of the dense model.

    Args:
        model: of a family that merges, dense or compact; masked ones are made compact first.
        target: share of `dense`, in (0, 1).
        batches: calibration images, without labels.
        dense: whose work counts as 1, and whose answers are to be kept; the model itself as it is, without it.

    Returns:
        `family` and `merges` of the choice, `ratio` (its share of the work), and `kl`: nats an image by family.

    Raises:
        ValueError: the model cannot merge, or no schedule is that cheap; the model is left as it was.
    """
    if not 0 < target < 1:
        raise ValueError(f"target is {target}; a share of the dense model's work in (0, 1) was expected")
    adapters.merge_(model, ())
    adapter, depth = adapters.of(model), len(adapters.of(model).blocks(model))
    work, whole = work_of(model), work_of(dense or model)(())
    tokens = adapter.tokens(model)
    prefix = adapter.prefix(model)
    found = {
        name: weakest(family, tokens, prefix, depth, lambda merges: work(merges) <= target * whole)
        for name, family in FAMILIES.items()
    }
    found = {name: merges for name, merges in found.items() if merges is not None}
    if not found:
        raise ValueError(f"no schedule of merging takes {target:g} of the work; prune widths as well, or ask for more")
    with evaluating(model), evaluating(dense or model):
        theirs = [adapters.predict(dense or model, x).log_softmax(-1) for x in batches]
        kl = {}
        for name, merges in found.items():
            adapters.merge_(model, merges)
            mine = [adapters.predict(model, x).log_softmax(-1) for x in batches]
            kl[name] = float(torch.cat([(t.exp() * (t - m)).sum(-1) for t, m in zip(theirs, mine, strict=True)]).mean())
    best = min(kl, key=kl.__getitem__)
    adapters.merge_(model, found[best])
    return {"family": best, "merges": found[best], "ratio": work(found[best]) / whole, "kl": kl}
