"""The masks of a model under pruning: what the saliency is, which units leave, when a target is met.

The paper's loop (arXiv:2110.04869, Sec. 3.2), line by line: after every optimizer step pruned weights become zero again
and the step's gradients add to the saliency (`Pruner.step`); every `interval` steps the bundles of lowest saliency less
latency credit leave (`Pruner.decide`), until the table says that a target is met.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .. import parallel
from ..config import PruneConfig
from ..latency.clock import time_rounds
from ..latency.table import LatencyTable
from ..selection.curves import Curve
from ..selection.greedy import drop_cheapest
from ..selection.lagrangian import drop_to_target
from ..spec import KINDS
from ..structure.compact import compact
from ..structure.masks import Masks, full_masks, widths
from .aim import Aim, Reading, measured
from .limits import check_reachable, least_ms, prunable_groups
from .prices import Prices, judged, nearest, ways_to_price
from .scorer import Scorer
from .timing import Timer, clock_of, ratios_of
from .tokens import least_share

__all__ = ["Pruner", "prunable_groups"]

Measure = Callable[[Mapping[str, Tensor]], Mapping[str, Curve]]
Judging = Callable[[Masks], float]


class Pruner(Scorer):
    """Masks a model in place, decision by decision; for people with their own training loop.

    >>> model = nvit.load(nvit.BUNDLED)
    >>> loader = nvit.data.TrainingData(nvit.data.Digits(training=True), batch_size=16)
    >>> config = nvit.PruneConfig(latency_target=0.8, interval=1, bundles_per_step=8)
    >>> pruner = nvit.Pruner(model, nvit.LatencyTable.analytic(model), config)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> for images, labels in loader:
    ...     torch.nn.functional.cross_entropy(model(images), labels).backward()
    ...     optimizer.step()
    ...     met = pruner.step()
    ...     optimizer.zero_grad()
    ...     if pruner.done:
    ...         break
    >>> met, pruner.ratio <= 0.8, pruner.compact()(images).shape
    ([0.8], True, torch.Size([16, 10]))

    Or in one shot, with any criterion and `train=False`:

    ```python
    for images, labels in loader:
        pruner.score(images, labels)          # or a backward pass of your own, then pruner.observe()
    pruner.decide_at(0.5)
    ```

    A target is met when the compact model is, as measured; by the table's word where the table counts operations, or
    `config.measure_seconds` is 0.

    Args:
        timer: what measures, the stopwatch unless it is a simulated one; None for the table's word.

    Attributes:
        targets: of latency, as fractions of dense, largest first.
        met: those settled so far: met, or as near as pruning comes.
        readings: what was measured at each of them.
        aim: where they lie by the table.
        ratios: measures models against the dense one; None for the table's word.
        curves: what the first units of a group cost where that was measured, by group.
        history: a row per decision.
        steps: so far.
        known_scores: what a sweep without training decides by, once it is there: the dense model's.
    """

    def __init__(
        self,
        model: nn.Module,
        table: LatencyTable,
        config: PruneConfig | None = None,
        *,
        timer: Timer | None = time_rounds,
    ) -> None:
        super().__init__(model, config or PruneConfig())
        self.table = table
        self.targets = sorted(self.config.latency_target, reverse=True)
        self.met: list[float] = []
        self.curves: dict[str, Curve] = {}
        self.history: list[dict[str, Any]] = []
        self.steps = 0
        self.known_scores: dict[str, Tensor] = {}
        if self.table.dense != widths(self.groups, self.masks):
            raise ValueError(
                f"the latency table is for a model whose first block is {self.table.dense[0]}; this model's is "
                f"{widths(self.groups, self.masks)[0]}. Measure a table for this model."
            )
        least = least_ms(table, self.groups, self.free, self.config.depth) / table.dense_ms
        seconds = 0.0 if timer is None else self.config.measure_seconds
        self.ratios = ratios_of(table.setting, seconds, self._whole, timer or time_rounds)
        self.aim = Aim(clock_of(self.ratios), least)
        self.readings: dict[float, Reading] = {}
        self._asked_for = False  # whether the masks are those of a target
        if self.criterion.capabilities.training:
            self.start_recording()

    @property
    def ratio(self) -> float:
        """Predicted latency as a fraction of dense."""
        return self.table.ratio(widths(self.groups, self.masks))

    @property
    def done(self) -> bool:
        """Whether every target is met."""
        return len(self.met) == len(self.targets)

    def check_targets(self) -> None:
        """Raise ValueError where a target is below what pruning can leave, by the table."""
        merging = least_share(self.model, self.config)
        check_reachable(self.targets, self.table, self.groups, self.free, self.config.depth, merging)

    def step(self, grads: Mapping[str, Tensor] | None = None) -> list[float]:
        """After `optimizer.step()`, while gradients are still there: zero what is pruned, score, decide when due.

        Returns:
            Targets met by this step.

        Raises:
            ValueError: at the first step, a target that no pruning reaches; at any, no gradient is there.
        """
        if not self.steps:
            self.check_targets()
        self.project()
        if not self.done:
            self.observe(grads)
        return self.advance()

    @property
    def deciding(self) -> bool:
        """Whether the next `advance` takes a decision."""
        return not self.done and (self.steps + 1) % self.config.interval == 0

    def advance(self) -> list[float]:
        """Count a step that was observed and projected, and decide when due; returns targets met by that."""
        self.steps += 1
        return [] if self.done or self.steps % self.config.interval else self.decide()

    def decide(self) -> list[float]:
        """Remove the bundles of lowest saliency less latency credit (Eq. 7); returns targets met by that.

        Raises:
            ValueError: all scores are alike, only last bundles are left, or ranks disagree; no mask has changed.
        """
        config, scores = self.config, self._telling_scores()
        masks = drop_cheapest(
            scores, self.masks, self.groups, self.table, config.bundles_per_step, config.latency_weight
        )
        if all(bool((masks[name] == keep).all()) for name, keep in self.masks.items()):
            raise ValueError(
                f"only last bundles are left at {self.ratio:.3f} of dense latency; raise the latency target"
            )
        self._take(scores, masks)
        return self._settle()

    def _telling_scores(self) -> dict[str, Tensor]:
        """The scores that a decision rests on.

        Raises:
            ValueError: they tell nothing apart.
        """
        scores = self.known_scores or self.scores()
        every = torch.cat([s[self.masks[name].to(s.device)].double().cpu() for name, s in scores.items()])
        if len(every) > 1 and bool((every == every[0]).all()):
            if self.config.train and not every[0]:
                raise ValueError(
                    f"all scores are 0 after {self.steps} steps: gradients were zeroed before pruner.step() read them "
                    "(call it before optimizer.zero_grad()), or the loss does not depend on the model"
                )
            raise ValueError(
                f"all {len(every)} scores are {float(every[0]):g}: criterion {self.criterion.name} tells no unit from "
                f"another. The loss does not depend on the model; check the labels and --task ({self.task.name} here)"
            )
        return scores

    def decide_at(self, target: float, measure: Measure | None = None, judge: Judging | None = None) -> None:
        """One decision down to `target`, least saliency removed at that latency; no training in between.

        Where `target` is one of `targets`, what was chosen is measured, and chosen again where it misses.

        Args:
            measure: from scores to what the first units of groups cost, asked once; scores order the units then, and
                these `curves` price them, here and in later decisions.
            judge: how far a model cut by masks is from the dense one; the nearest of all ways' choices is taken.
        """
        priced, said = self.ways(measure), {}
        scores, prices = priced["predicted"].units, (fastest := list(priced.values())[-1])
        if judge is not None:
            by_table = target in self.targets and not self.aim.beyond(target)
            ratio = self.aim.at(target) if by_table else target
            ways = {way: p for way, p in judged(priced, self.config.cost).items() if self._reaches(p, ratio)}
            if len(ways) > 1:
                prices, said = nearest(ways, lambda p: judge(self._least(p, ratio)[0]))

        def choose(ratio: float) -> tuple[float, tuple[Masks, float]]:
            masks, eta = self._least(prices if self._reaches(prices, ratio) else fastest, ratio)
            return self.table.ratio(widths(self.groups, masks)), (masks, eta)

        if target not in self.targets:
            masks, eta = choose(target)[1]
            self._take(scores, masks, eta=eta, **said)
            self._settle_to(self.ratio)
        else:
            (masks, eta), reading = self.aim.hit(target, choose, lambda choice: self._cut(choice[0]))
            self._take(scores, masks, eta=eta, **said, **measured(reading))
            self._settle_to(self.ratio if reading is None else target, reading)
        self._asked_for = True

    def ways(self, measure: Measure | None = None) -> dict[str, Prices]:
        """What units and sublayers cost, see `ways_to_price`; `measure` as in `decide_at`."""
        scores = self._telling_scores()
        if measure is not None and not self.curves:
            self.curves = dict(measure(scores))
        return ways_to_price(scores, self.free, self.masks, self.curves)

    def _least(self, prices: Prices, ratio: float) -> tuple[Masks, float]:
        """`drop_to_target` from here, at a fraction of the dense latency."""
        ms = ratio * self.table.dense_ms
        return drop_to_target(prices.units, self.masks, self.groups, self.table, ms, prices.ends)

    def _reaches(self, prices: Prices, ratio: float) -> bool:
        """Whether a choice by such prices can be that fast."""
        least = least_ms(self.table, self.groups, self.free, bool(prices.ends), self.masks)
        return least <= ratio * self.table.dense_ms

    def _take(self, scores: Mapping[str, Tensor], masks: Masks, **more: Any) -> None:
        """Mask what a decision chose, once every rank has decided alike."""
        found = {f"score of {n}": s for n, s in scores.items()} | {f"mask of {n}": m for n, m in masks.items()}
        parallel.agree(f"the decision at step {self.steps}", found)
        if self.config.train:
            self.criterion.decided()
        else:
            self._forget()
            if self.config.sweep:
                self.known_scores = dict(scores)
        self._set_masks(masks)
        self.history.append({"step": self.steps, "predicted_ratio": self.ratio} | more)

    def _settle(self) -> list[float]:
        """Targets that the last decision met, or that no further one could meet."""
        found = []
        for target in self.targets[len(self.met) :]:
            if self.ratio > self.aim.at(target):
                break
            if self.aim.clock is not None:
                reading = self.aim.read(self.ratio, lambda: self._cut(self.masks))
                self.history[-1] |= measured(reading)
                if not reading.meets(target) and not self.aim.beyond(target):
                    break  # the aim is corrected, and pruning goes on to there
                self.readings[target] = reading
            found.append(target)
        self._settle_to(found[-1] if found else 1.0)
        return found

    def _settle_to(self, least: float, reading: Reading | None = None) -> None:
        """Every open target from `least` on is settled, by one reading if there is one."""
        found = [t for t in self.targets[len(self.met) :] if t >= least]
        self.met += found
        self._asked_for = bool(found)
        if reading is not None:
            self.readings |= dict.fromkeys(found, reading)
        if self.done:
            self.stop_recording()

    def settle(self, masks: Masks, weights: Mapping[str, Tensor], readings: Mapping[float, Reading | None]) -> None:
        """Every target is settled by models that were chosen elsewhere; the model gets these masks and weights, which
        are those of the last one."""
        self.put(masks, weights)
        self.met, self._asked_for = list(self.targets), True
        self.readings |= {t: reading for t, reading in readings.items() if reading is not None}
        self.stop_recording()

    def put(self, masks: Masks, weights: Mapping[str, Tensor]) -> None:
        """Give the model masks and full weights."""
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(weights[name])
        self._set_masks(masks)

    def _cut(self, masks: Masks, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        weights = parallel.gathered(self.params) if weights is None else weights
        return compact(self.model, self.groups, masks, weights).eval()

    def _whole(self) -> nn.Module:
        """A model of all widths to be timed; what was pruned is zero in it."""
        return self._cut(full_masks(self.groups))

    def compact(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A narrower copy that computes what the masked model does; or with other full `weights`, as an average.

        Warns where the masks are not those of a target while targets are open: a loop that ended early.
        """
        if not self.done and not self._asked_for:
            still = ", ".join(f"{t:g}" for t in self.targets[len(self.met) :])
            warnings.warn(
                f"compact(): the model is at {self.ratio:.3f} of the dense latency by the table and latency target "
                f"{still} is open; go on with step() until pruner.done",
                stacklevel=2,
            )
        return self._cut(self.masks, weights)

    def mean_widths(self) -> dict[str, float]:
        """Each of the five widths as the masks leave it, in the mean over blocks."""
        blocks = widths(self.groups, self.masks)
        return {kind: sum(getattr(b, kind) for b in blocks) / len(blocks) for kind in KINDS}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain values and tensors from which `restore` goes on."""
        values = {"met": self.met, "history": self.history, "steps": self.steps, "scored": self.mean.count}
        values |= {"aim": [asdict(r) for r in self.aim.readings], "decisions": self.mean.decisions}
        values["curves"] = {n: asdict(c) for n, c in self.curves.items()}
        values["readings"] = {str(t): asdict(r) for t, r in self.readings.items()}
        tensors = {f"mask.{n}": m for n, m in self.masks.items()}
        for part, held in (("mean", self.mean.sums), ("past", self.mean.past), ("known", self.known_scores)):
            tensors |= {f"{part}.{n}": s for n, s in held.items()}
        return {"pruner": values}, tensors

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        mine = values["pruner"]
        self._set_masks({n.removeprefix("mask."): t for n, t in tensors.items() if n.startswith("mask.")})
        device = next(iter(self.params.values())).device
        for part, held in (("mean.", self.mean.sums), ("past.", self.mean.past), ("known.", self.known_scores)):
            held.clear()
            held |= {n.removeprefix(part): t.to(device) for n, t in tensors.items() if n.startswith(part)}
        self.mean.count, self.mean.decisions, self.steps = mine["scored"], mine["decisions"], mine["steps"]
        self.met, self.history = list(mine["met"]), list(mine["history"])
        self.aim.readings = [Reading(**r) for r in mine["aim"]]
        self.curves = {n: Curve(tuple(c["gone"]), tuple(c["cost"])) for n, c in mine.get("curves", {}).items()}
        self.readings = {float(t): Reading(**r) for t, r in mine["readings"].items()}
        if self.done:
            self.stop_recording()
