"""How far a model is from the dense one by how its tokens merge: blocks before the first that merges otherwise than in
a schedule seen before do not run again, nor do images once they would change nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import adapters
from ..adapters.base import Logits
from ..calibration.replay import logits_behind
from ..selection.schedules import Merges
from ..structure.verify import evaluating
from ..tasks.nearness import Nearness
from ..utils.devices import sent

KEPT = 2**29
"""Bytes that blocks may have put out for one schedule, at most; where there are more, all blocks run every time."""

LOOK = 4
"""Batches between two looks at whether a schedule is farther than another."""


@dataclass(frozen=True)
class _Seen:
    """A schedule, and by batch what blocks put out."""

    merges: Merges = ()
    outs: Mapping[int, list[Any]] = field(default_factory=dict)

    def alike(self, merges: Merges) -> int:
        """Blocks before the first that merges otherwise; none where only one of both merges, whose blocks hand on more
        than the stream."""
        if any(self.merges) != any(merges):
            return 0
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.merges, merges, strict=False)))


class Distances:
    """Distances of a model by schedule, as `Nearness` takes them; the model merges as in the last one afterwards.

    What blocks put out is remembered of two schedules: one, and the last that was looked at. That one takes the other's
    place as soon as more of a schedule is like it, which is so once its change is taken.
    """

    def __init__(self, model: nn.Module, near: Nearness) -> None:
        self.model, self.near = model, near
        self.base = self.last = _Seen()
        self.totals: dict[Merges, Tensor] = {}
        # Sharp images come before coarse ones: any few batches are to have some of both.
        batches = len(near.batches)
        self.order = [b for i in range((batches + 1) // 2) for b in range(i, batches, (batches + 1) // 2)]

    def of(self, merges: Merges, beside: Merges | None = None) -> float:
        """The distance of a schedule; infinite where the first images tell that it is farther than `beside`, one of
        those whose distance was asked for before."""
        adapters.merge_(self.model, merges)
        if self.last.alike(merges) > self.base.alike(merges):
            self.base = self.last
        start, outs, totals = self.base.alike(merges), {}, {}
        self.last = _Seen()
        with torch.no_grad(), evaluating(self.model):
            for n, b in enumerate(self.order, 1):
                outs[b] = list(self.base.outs[b][:start]) if start else []
                totals[b] = self.near.total(b, self._answers(b, start, outs[b]))
                if beside is not None and n % LOOK == 0 and _farther(totals, self.totals[beside]):
                    return math.inf
        whole = sum(t.nbytes for found in outs.values() for t in tree_leaves(found) if isinstance(t, Tensor))
        if whole <= KEPT:
            self.last = _Seen(merges, outs)
        self.totals[merges] = torch.stack([totals[b] for b in range(len(totals))])
        return float(self.totals[merges].sum() / self.near.images)

    def _answers(self, batch: int, start: int, outs: list[Any]) -> Logits:
        """To the images of a batch, from what the first `start` blocks put out; `outs` gets what the others do."""
        device, known = next(self.model.parameters()).device, list(outs)
        handles = [
            block.register_forward_hook(lambda _m, _a, out: outs.append(out))
            for block in adapters.of(self.model).blocks(self.model)[start:]
        ]
        try:
            return logits_behind(self.model, known, sent(self.near.batches[batch], device))
        finally:
            for handle in handles:
                handle.remove()


def _farther(totals: Mapping[int, Tensor], than: Tensor) -> bool:
    """Whether batches are farther than the same ones were, by more than the standard error of their mean."""
    farther = torch.stack([total - than[b] for b, total in totals.items()])
    return bool(farther.mean() > farther.std() / len(farther) ** 0.5)
