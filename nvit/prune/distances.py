"""How far a model is from the dense one by how its tokens merge: blocks before the first that merges otherwise than in
a schedule seen before do not run again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Seen:
    """A schedule, and by batch what blocks put out."""

    merges: Merges = ()
    outs: tuple[list[Any], ...] = ()

    def alike(self, merges: Merges) -> int:
        """Blocks before the first that merges otherwise; none where only one of both merges, whose blocks hand on more
        than the stream."""
        if any(self.merges) != any(merges):
            return 0
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.merges, merges, strict=False)))


class Distances:
    """Distances of a model by schedule, as `Nearness` takes them; the model merges as in the last one afterwards.

    Two schedules are remembered: one, and the last that was looked at. That one takes the other's place as soon as
    more of a schedule is like it, which is so once its change is taken.
    """

    def __init__(self, model: nn.Module, near: Nearness) -> None:
        self.model, self.near = model, near
        self.base = self.last = _Seen()

    def of(self, merges: Merges) -> float:
        adapters.merge_(self.model, merges)
        if self.last.alike(merges) > self.base.alike(merges):
            self.base = self.last
        start, outs = self.base.alike(merges), []
        with torch.no_grad(), evaluating(self.model):
            distance = float(self.near.mean(self._answers(start, outs)))
        whole = sum(t.nbytes for found in outs for t in tree_leaves(found) if isinstance(t, Tensor))
        self.last = _Seen(merges, tuple(outs)) if whole <= KEPT else _Seen()
        return distance

    def _answers(self, start: int, outs: list[list[Any]]) -> Iterator[Logits]:
        """Answers by batch, the first `start` blocks taken from `base`; `outs` gets what all blocks put out."""
        blocks, device = adapters.of(self.model).blocks(self.model), next(self.model.parameters()).device
        for b, images in enumerate(self.near.batches):
            found = list(self.base.outs[b][:start]) if start else []
            outs.append(found)
            handles = [
                block.register_forward_hook(lambda _m, _a, out, found=found: found.append(out))
                for block in blocks[start:]
            ]
            try:
                yield logits_behind(self.model, found[:start], sent(images, device))
            finally:
                for handle in handles:
                    handle.remove()
