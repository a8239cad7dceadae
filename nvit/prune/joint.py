"""Widths and tokens together, without training. Widths are pruned from rung to rung and refitted; from each rung tokens
merge down to the targets, a schedule of every family. At each target the candidate whose answers are nearest to the
dense model's wins, and what it takes is measured and corrected.

Costs of merging do not add up over blocks, nor with those of widths, so that whole candidates are compared, and few of
them: going on to narrower widths ends where it helps no target any more. The refit sees all tokens: refitted on merged
ones, models were worse.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import adapters
from ..layers.merging import counts
from ..selection.schedules import Merges
from ..structure.compact import compact
from ..structure.masks import Masks
from ..tasks.nearness import Nearness
from ..utils.logs import Log, unlogged
from ..utils.progress import Progress
from . import between
from .aim import Aim, Reading, measured
from .folder import RunFolder
from .merging_cost import MergingCost, Rung, measure_merging
from .oneshot import Steps
from .pruner import Pruner
from .result import Pruned
from .sample import held_back
from .tokens import check_merging, work_of

LADDER = (0.9, 0.8, 0.65, 0.5, 0.35)
"""Latencies, of dense, at which narrower widths are tried beneath merged tokens."""

MERGED = ("tokens", "schedule", "widths_ratio", "distance")
"""What the metrics of a snapshot say of its tokens: how many enter the first block and leave each, the family of the
schedule, the predicted latency of the widths alone, and how far answers are from the dense model's (see
`tasks.nearness`)."""


@dataclass(frozen=True)
class Choice:
    """A candidate for a target."""

    rung: Rung
    family: str
    merges: Merges
    distance: float


def prune_with_tokens(pruner: Pruner, loader, keep: RunFolder, progress: Progress, log: Log = unlogged) -> list[Pruned]:
    """A snapshot for each target, all at the end."""
    check_merging(pruner.model, pruner.config)
    snapshots = between.go_on(pruner, keep)
    if snapshots:
        adapters.merge_(pruner.model, adapters.merges(snapshots[-1].model))
        return snapshots
    walk = Walk(pruner, loader, progress)
    steps: Steps | None = None
    for rung in rungs(pruner):
        if rung < 1:
            steps = steps or Steps(pruner, loader, None, progress, log)
            steps.to(rung)
        if not walk.look(rung):
            break
    snapshots = [keep_(pruned, keep) for pruned in walk.settle()]
    between.keep(pruner, keep)
    return snapshots


def rungs(pruner: Pruner) -> Iterator[float]:
    """Latencies of widths alone, from the dense model down to the last target, where widths may leave."""
    yield 1.0
    targets, least = pruner.targets, pruner.aim.least
    yield from (r for r in sorted({*LADDER, *targets}, reverse=True) if r >= max(targets[-1], least) and pruner.free)


def keep_(pruned: Pruned, keep: RunFolder) -> Pruned:
    """The same, once it is written."""
    keep.save(pruned)
    return pruned


class Walk:
    """What was looked at on the way down, and the best of it.

    Attributes:
        best: by target, the candidate nearest to the dense model so far.
    """

    def __init__(self, pruner: Pruner, loader, progress: Progress) -> None:
        self.pruner, self.progress = pruner, progress
        pruner.stop_recording()
        pruner.model.eval()
        self.near = Nearness(pruner.task, pruner.model, held_back(loader, pruner.config))
        if self.near.dense[0].cls.dim() > 2:
            raise ValueError(
                f"only tokens: the model's answers are {tuple(self.near.dense[0].cls.shape)}, about every place of an "
                "image, so each of its tokens is needed; leave out tokens"
            )
        progress(0, 1, "what merging takes")
        self.cost: MergingCost = measure_merging(pruner.model, pruner.ratios)
        progress(1, 1, "what merging takes")
        self.dense_work = work_of(pruner.model)
        self.best: dict[float, Choice] = {}
        self.last: tuple[Masks, dict[str, Tensor]] | None = None

    def look(self, at: float) -> bool:
        """Judge the candidates of the widths that there are now, pruned to the latency `at`; whether any target gained,
        or has none yet."""
        pruner, gained = self.pruner, False
        rung = Rung(compact(pruner.model, pruner.groups, pruner.masks), pruner.ratio, self.cost, self.dense_work)
        targets = [t for t in pruner.targets if t <= at]
        for n, target in enumerate(targets):
            for choice in self._candidates(rung, target, met=target == at or rung.ratio <= target):
                row = {"step": pruner.steps, "predicted_ratio": rung.predicted(choice.family, choice.merges)}
                more = {"target": target, "widths_ratio": rung.ratio, "schedule": choice.family, "candidate": 1}
                pruner.history.append(row | more | {"distance": choice.distance})
                if target not in self.best or choice.distance < self.best[target].distance:
                    self.best[target], gained = choice, True
                    if target == pruner.targets[-1]:
                        self.last = dict(pruner.masks), {n: p.detach().clone() for n, p in pruner.params.items()}
            self.progress(n + 1, len(targets), "merge")
        return gained or any(t not in self.best for t in pruner.targets)

    def _candidates(self, rung: Rung, target: float, met: bool) -> Iterator[Choice]:
        found = {"none": (0,) * len(adapters.of(rung.model).blocks(rung.model))} if met else rung.schedules(target)
        for family, merges in found.items():
            distance = self.near.of(adapters.merge_(rung.model, merges))
            adapters.merge_(rung.model, ())
            yield Choice(rung, family, merges, distance)

    def settle(self) -> list[Pruned]:
        """The best of every target, measured and corrected; the pruner's model becomes that of the last one.

        Raises:
            ValueError: nothing meets a target.
        """
        pruner, found = self.pruner, []
        for target in pruner.targets:
            if target not in self.best:
                raise ValueError(
                    f"latency target {target:g} of dense cannot be met: as many tokens as can merge, and the smallest "
                    "allowed widths, take more. Raise the target, or allow more groups to be pruned."
                )
            found.append(self._pruned(target, self.best[target]))
        pruner.settle(*self.last, {p.target: p.reading for p in found})
        adapters.merge_(pruner.model, adapters.merges(found[-1].model))
        return found

    def _pruned(self, target: float, choice: Choice) -> Pruned:
        rung, family, merges = choice.rung, choice.family, choice.merges
        reading: Reading | None = self.pruner.readings.get(target) if not any(merges) else None
        if reading is None and any(merges):

            def choose(ratio: float) -> tuple[float, Merges]:
                merges = rung.schedules(ratio).get(family) or choice.merges
                return rung.predicted(family, merges), merges

            aim = Aim(self.pruner.aim.clock, rung.least(family))
            merges, reading = aim.hit(target, choose, lambda merges: self._with(rung, merges))
        model, predicted = self._with(rung, merges), rung.predicted(family, merges)
        tokens = counts(adapters.of(model).tokens(model), merges)
        row: dict[str, Any] = {"schedule": family, "widths_ratio": rung.ratio, "distance": choice.distance}
        head = {"step": self.pruner.steps, "predicted_ratio": predicted, "target": target}
        self.pruner.history.append(head | row | measured(reading))
        return Pruned(target, model, predicted, row | {"tokens": tokens}, reading)

    def _with(self, rung: Rung, merges: Merges) -> nn.Module:
        """A copy of a rung's model with these merges."""
        return adapters.merge_(copy.deepcopy(rung.model), merges)
