"""The masks of a model under pruning: what the saliency is, which units leave, when a target is met.

The paper's loop (arXiv:2110.04869, Sec. 3.2), line by line: after every optimizer step pruned weights become zero again
and the step's gradients add to the saliency (`Pruner.step`); every `interval` steps the bundles of lowest saliency less
latency credit leave (`Pruner.decide`), until the table says that a target is met.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import parallel
from ..config import PruneConfig
from ..latency.table import LatencyTable
from ..selection.greedy import drop_cheapest
from ..selection.lagrangian import drop_to_target
from ..structure.compact import compact
from ..structure.masks import Masks, widths
from .limits import prunable_groups
from .scorer import Scorer

__all__ = ["Pruner", "prunable_groups"]


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

    Attributes:
        targets: of latency, as fractions of dense, largest first.
        met: those met so far.
        history: a row per decision.
        steps: so far.
    """

    def __init__(self, model: nn.Module, table: LatencyTable, config: PruneConfig | None = None) -> None:
        super().__init__(model, config or PruneConfig())
        self.table = table
        self.targets = sorted(self.config.latency_target, reverse=True)
        self.met: list[float] = []
        self.history: list[dict[str, Any]] = []
        self.steps = 0
        if self.table.dense != widths(self.groups, self.masks):
            raise ValueError(
                f"the latency table is for a model whose first block is {self.table.dense[0]}; this model's is "
                f"{widths(self.groups, self.masks)[0]}. Measure a table for this model."
            )
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

    def step(self, grads: Mapping[str, Tensor] | None = None) -> list[float]:
        """After `optimizer.step()`, while gradients are still there: zero what is pruned, score, decide when due.

        Returns:
            Targets met by this step.
        """
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
        return self._take(scores, masks)

    def _telling_scores(self) -> dict[str, Tensor]:
        """The scores that a decision rests on.

        Raises:
            ValueError: they tell nothing apart.
        """
        scores = self.scores()
        every = torch.cat([s[self.masks[name].to(s.device)].double().cpu() for name, s in scores.items()])
        if len(every) > 1 and bool((every == every[0]).all()):
            raise ValueError(
                f"all {len(every)} scores are {float(every[0]):g}: criterion {self.criterion.name} tells no unit from "
                f"another. The loss does not depend on the model; check the labels and --task ({self.task.name} here)"
            )
        return scores

    def decide_at(self, target: float) -> None:
        """One decision down to `target`, least saliency removed at that latency; no training in between."""
        scores = self._telling_scores()
        masks, eta = drop_to_target(scores, self.masks, self.groups, self.table, target * self.table.dense_ms)
        self._take(scores, masks, eta=eta)

    def _take(self, scores: Mapping[str, Tensor], masks: Masks, **more: Any) -> list[float]:
        """Mask what a decision chose, once every rank has decided alike; returns targets met by that."""
        found = {f"score of {n}": s for n, s in scores.items()} | {f"mask of {n}": m for n, m in masks.items()}
        parallel.agree(f"the decision at step {self.steps}", found)
        if self.config.train:
            self.criterion.decided()
        else:
            self._forget()
        self._set_masks(masks)
        now = self.ratio
        self.history.append({"step": self.steps, "predicted_ratio": now} | more)
        met = [t for t in self.targets[len(self.met) :] if now <= t]
        self.met += met
        if self.done:
            self.stop_recording()
        return met

    def compact(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A narrower copy that computes what the masked model does; or with other full `weights`, as an average."""
        weights = parallel.gathered(self.params) if weights is None else weights
        return compact(self.model, self.groups, self.masks, weights).eval()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain values and tensors from which `restore` goes on."""
        values = {"met": self.met, "history": self.history, "steps": self.steps, "scored": self.mean.count}
        tensors = {f"mask.{n}": m for n, m in self.masks.items()}
        values["decisions"] = self.mean.decisions
        for part, held in (("mean", self.mean.sums), ("past", self.mean.past)):
            tensors |= {f"{part}.{n}": s for n, s in held.items()}
        return {"pruner": values}, tensors

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        mine = values["pruner"]
        masks = {n.removeprefix("mask."): t for n, t in tensors.items() if n.startswith("mask.")}
        self._set_masks(masks)
        device = next(iter(self.params.values())).device
        for part, held in (("mean.", self.mean.sums), ("past.", self.mean.past)):
            held.clear()
            held |= {n.removeprefix(part): t.to(device) for n, t in tensors.items() if n.startswith(part)}
        self.mean.count, self.mean.decisions, self.steps = mine["scored"], mine["decisions"], mine["steps"]
        self.met, self.history = list(mine["met"]), list(mine["history"])
        if self.done:
            self.stop_recording()
