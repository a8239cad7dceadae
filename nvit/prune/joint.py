"""Widths and tokens together, without training: for every target, tokens merge to a latency above it, and of the widths
leaves what costs least where tokens are still there. Several such latencies are tried; what keeps answers nearest to
the dense model's wins, on images as they are and on the same seen through fewer pixels. Its blocks then hand merges on
to each other for as long as that brings answers nearer, and what it takes is measured and corrected.

Costs of merging do not add up over blocks, nor with those of widths, so that whole candidates are compared, and few of
them: going on to fewer merges ends where it helps no more. The refit sees all tokens: refitted on merged ones, models
were worse.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Any

from torch import Tensor, nn

from .. import adapters
from ..calibration.coarse import coarser
from ..layers.merging import counts
from ..selection.exchange import exchange
from ..selection.lagrangian import drop_to_target
from ..selection.schedules import FAMILIES, Family, Merges, proportional
from ..structure.compact import compact
from ..structure.masks import Masks, full_masks, widths
from ..tasks.nearness import Nearness
from ..utils.logs import Log, unlogged
from ..utils.progress import Progress
from . import between
from .aim import Aim, Reading, measured
from .distances import Distances
from .folder import RunFolder
from .limits import least_ms
from .merged_table import merged_table
from .merging_cost import MergingCost, Rung, measure_merging
from .oneshot import Refitter
from .prices import Prices, compares, nearest
from .pruner import Pruner
from .result import Pruned
from .sample import fitted_count, fitted_images, held_back
from .scoring import score
from .tokens import check_merging, shape_of, work_of

LADDER = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Latencies, of dense, that merging alone is to reach; widths do the rest."""

EXCHANGES, SEEN = 64, 192
"""Schedules that the best candidate of a target is compared with, and of the images that refit so many as have to agree
with those held back: no weight is fitted to merges, and a few dozen images alone would choose by their outliers."""

FLATTERED = 1.1
"""Narrower widths are taken where their distance is less by this factor: images held back are of one kind with those
that refitted what is left, and tell less of what others would."""

MERGED = ("tokens", "schedule", "widths_ratio", "distance")
"""What the metrics of a snapshot say of its tokens: how many enter the first block and leave each, the family of the
schedule, the predicted latency of the widths alone, and how far answers are from the dense model's (see
`tasks.nearness`)."""


@dataclass(frozen=True)
class Choice:
    """A candidate for a target; `weights` those of the masked model, where they are needed in the end."""

    rung: Rung
    family: str
    merges: Merges
    distance: float
    masks: Masks
    weights: dict[str, Tensor] | None
    exchanged: bool = False

    @property
    def schedule(self) -> str:
        """What history and metrics call it."""
        return f"{self.family}, exchanged" if self.exchanged else self.family

    @property
    def predicted(self) -> float:
        return self.rung.predicted(self.merges)

    @property
    def like(self) -> Family:
        """Schedules that merge more and less of the same kind."""
        return proportional(self.merges) if any(self.merges) else FAMILIES[self.family]


def prune_with_tokens(pruner: Pruner, loader, keep: RunFolder, progress: Progress, log: Log = unlogged) -> list[Pruned]:
    """A snapshot for each target, all at the end."""
    check_merging(pruner.model, pruner.config)
    snapshots = between.go_on(pruner, keep)
    if snapshots:
        adapters.merge_(pruner.model, adapters.merges(snapshots[-1].model))
        return snapshots
    walk = Walk(pruner, loader, progress, log)
    for target in pruner.targets:
        walk.down_to(target)
    snapshots = walk.settle()
    for pruned in snapshots:
        keep.save(pruned)
    between.keep(pruner, keep)
    return snapshots


class Cuts:
    """Narrower copies of the dense model, refitted where the recipe says so."""

    def __init__(self, pruner: Pruner, loader, progress: Progress) -> None:
        self.pruner, config = pruner, pruner.config
        self.refitter = refitter = Refitter(pruner, loader, progress) if config.refit else None
        score(pruner, loader, statistics=refitter.statistics if refitter else None, progress=progress)
        ways = pruner.ways(refitter.costs if config.measures_costs else None)
        self.ways = ways if compares(config) else dict([list(ways.items())[-1]])
        self.dense = _weights(pruner)

    def to(self, target: float, merges: Merges) -> tuple[Masks, dict[str, Any]] | None:
        """Leave in the pruner's model what widths it may have where tokens merge so and the whole is to take a share of
        the dense latency; its masks, and what history says of the choice and of the refit. None where no widths are
        that narrow."""
        pruner, whole = self.pruner, full_masks(self.pruner.groups)
        table, ms = merged_table(pruner.table, pruner.model, merges), target * pruner.table.dense_ms
        if ms < least_ms(table, pruner.groups, pruner.free):
            return None

        def cut(prices: Prices) -> Masks:
            return drop_to_target(prices.units, whole, pruner.groups, table, ms)[0]

        prices, said = list(self.ways.values())[-1], {}
        if len(self.ways) > 1:
            prices, said = nearest(self.ways, lambda way: self.refitter.distance(cut(way)))
        masks = cut(prices)
        pruner.put(masks, self.dense)
        return masks, said | (self.refitter.refit() if self.refitter else {})


def _weights(pruner: Pruner) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in pruner.params.items()}


class Walk:
    """What was looked at, and the best of it.

    Attributes:
        best: by target, the candidate nearest to the dense model so far.
    """

    def __init__(self, pruner: Pruner, loader, progress: Progress, log: Log = unlogged) -> None:
        self.pruner, self.loader, self.progress, self.log = pruner, loader, progress, log
        pruner.stop_recording()
        pruner.model.eval()
        fitted = fitted_count(loader, pruner.config)
        held = held_back(loader, pruner.config, fitted)
        # What merging alone loses hardly depends on how sharp images are, what a refitted model does, much.
        self.near = Nearness(pruner.task, pruner.model, [*held, *coarser(held, 1.0)])
        self.near_too = Nearness(pruner.task, pruner.model, fitted_images(loader, pruner.config, fitted, SEEN))
        if self.near.dense[0].cls.dim() > 2:
            raise ValueError(
                f"only tokens: the model's answers are {tuple(self.near.dense[0].cls.shape)}, about every place of an "
                "image, so each of its tokens is needed; leave out tokens"
            )
        progress(0, 1, "what merging takes")
        self.cost: MergingCost = measure_merging(pruner.model, pruner.ratios)
        progress(1, 1, "what merging takes")
        self.dense_work = work_of(pruner.model)
        self.whole, self.start = full_masks(pruner.groups), _weights(pruner)
        self.dense = Rung(compact(pruner.model, pruner.groups, self.whole), 1.0, self.cost, self.dense_work)
        self.alone: dict[float, dict[str, tuple[Merges, float]]] = {}
        self.best: dict[float, Choice] = {}

    @cached_property
    def cuts(self) -> Cuts:
        """Made when widths leave for the first time; the model is dense then."""
        return Cuts(self.pruner, self.loader, self.progress)

    def down_to(self, target: float) -> None:
        """Find the best candidate for a target: merging alone, then less and less of it."""
        shares = [target, *(s for s in LADDER if s > target)] if self.pruner.free else [target]
        for n, share in enumerate(shares):
            gained = self._look(target, share)
            self.progress(n + 1, len(shares), f"merge: {target:g}")
            if target in self.best and not gained:
                break
        self.progress(len(shares), len(shares), f"merge: {target:g}")
        if target in self.best:
            self._exchange(target)

    def merged(self, share: float) -> dict[str, tuple[Merges, float]]:
        """By family the schedule with which the dense model takes a share of its latency, and its distance; the nearest
        first."""
        if share not in self.alone:
            found = {f: (m, self._distance(self.dense.model, m)) for f, m in self.dense.schedules(share).items()}
            self.alone[share] = dict(sorted(found.items(), key=lambda item: item[1][1]))
        return self.alone[share]

    def _distance(self, model: nn.Module, merges: Merges) -> float:
        distance = self.near.of(adapters.merge_(model, merges))
        adapters.merge_(model, ())
        return distance

    def _look(self, target: float, share: float) -> bool:
        """Judge what merges to `share` and is cut to the target; whether it is nearer than all before."""
        gained = False
        for choice, more in self._candidates(target, share):
            best = self.best.get(target)
            self._tell(target, choice, more)
            narrower = best is not None and choice.rung.ratio < best.rung.ratio
            if best is None or (FLATTERED if narrower else 1.0) * choice.distance < best.distance:
                self.best[target], gained = choice, True
        return gained

    def _tell(self, target: float, choice: Choice, more: dict[str, Any]) -> None:
        """A row of history."""
        row = {"step": self.pruner.steps, "predicted_ratio": choice.predicted, "target": target, "candidate": 1}
        row |= {"widths_ratio": choice.rung.ratio, "schedule": choice.schedule, "distance": choice.distance}
        self.pruner.history.append(row | more)
        self.log("prune", len(self.pruner.history), {"ratio": choice.predicted, "distance": choice.distance})

    def _exchange(self, target: float) -> None:
        """Let blocks of the best candidate hand merges on, and keep what is nearer for it."""
        best, looks = self.best[target], count(1)
        model = best.rung.model
        held, too = Distances(model, self.near), Distances(model, self.near_too)

        def near(merges: Merges, beside: Merges | None) -> float:
            self.progress(min(next(looks), EXCHANGES), EXCHANGES, f"exchange: {target:g}")
            return held.of(merges, beside)

        def enough(merges: Merges) -> bool:
            return best.rung.predicted(merges) <= target

        tokens, prefix, _ = shape_of(model)
        merges = exchange(best.merges, tokens, prefix, enough, (near, too.of), EXCHANGES)
        adapters.merge_(model, ())
        self.progress(EXCHANGES, EXCHANGES, f"exchange: {target:g}")
        if merges != best.merges:
            distance = self._distance(model, merges)
            self.best[target] = replace(best, merges=merges, distance=distance, exchanged=True)
            self._tell(target, self.best[target], {})

    def _candidates(self, target: float, share: float) -> Iterator[tuple[Choice, dict[str, Any]]]:
        pruner, last = self.pruner, target == self.pruner.targets[-1]
        alone = self.merged(share)
        if share == target:
            for family, (merges, distance) in alone.items():
                yield Choice(self.dense, family, merges, distance, self.whole, self.start), {}
            return
        if not alone:
            return
        merges, _ = next(iter(alone.values()))
        extra = self.cost.of(self.dense_work(merges) / self.dense_work(()))
        if (cut := self.cuts.to(target - extra, merges)) is None:
            return
        masks, said = cut
        small = compact(pruner.model, pruner.groups, masks)
        rung = Rung(small, pruner.table.ratio(widths(pruner.groups, masks)), self.cost, self.dense_work)
        weights = _weights(pruner) if last else None
        for family, exact in rung.schedules(target).items():
            yield Choice(rung, family, exact, self._distance(small, exact), masks, weights), said
            said = {}  # of the refit, which was one

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
        last = self.best[pruner.targets[-1]]
        pruner.settle(last.masks, last.weights, {p.target: p.reading for p in found})
        adapters.merge_(pruner.model, adapters.merges(found[-1].model))
        return found

    def _pruned(self, target: float, choice: Choice) -> Pruned:
        rung, family, merges = choice.rung, choice.family, choice.merges
        like = {family: choice.like}

        def choose(ratio: float) -> tuple[float, Merges]:
            merges = rung.schedules(ratio, like).get(family) or choice.merges
            return rung.predicted(merges), merges

        reading: Reading | None = None
        if self.pruner.aim.clock is not None:
            self.progress(0, 1, f"measure: {target:g}")
            aim = Aim(self.pruner.aim.clock, rung.predicted(choice.like(*shape_of(rung.model), 1.0)))
            merges, reading = aim.hit(target, choose, lambda merges: self._with(rung, merges))
            self.progress(1, 1, f"measure: {target:g}")
        model, predicted = self._with(rung, merges), rung.predicted(merges)
        tokens = counts(adapters.of(model).tokens(model), merges)
        row: dict[str, Any] = {"schedule": choice.schedule, "widths_ratio": rung.ratio, "distance": choice.distance}
        head = {"step": self.pruner.steps, "predicted_ratio": predicted, "target": target}
        self.pruner.history.append(head | row | measured(reading))
        return Pruned(target, model, predicted, row | {"tokens": tokens}, reading)

    def _with(self, rung: Rung, merges: Merges) -> nn.Module:
        """A copy of a rung's model with these merges."""
        return adapters.merge_(copy.deepcopy(rung.model), merges)
