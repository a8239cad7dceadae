"""The masks of a model under pruning: what the saliency is, which units leave, when a target is met.

The paper's loop (arXiv:2110.04869, Sec. 3.2), line by line: after every optimizer step pruned weights become zero again
and the step's gradients add to the saliency (`Pruner.step`); every `interval` steps the bundles of lowest saliency less
latency credit leave (`Pruner.decide`), until the table says that a target is met.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .. import adapters, parallel
from ..calibration.capture import Place
from ..calibration.statistics import SiteStatistics
from ..config import PruneConfig
from ..criteria.base import Context, Criterion, Evidence, RunningMean
from ..criteria.registry import CRITERIA
from ..latency.table import LatencyTable
from ..layers import prunable_layers
from ..selection.greedy import drop_cheapest
from ..selection.lagrangian import drop_to_target
from ..structure.compact import compact
from ..structure.masks import Masks, apply_, full_masks, widths
from .budget import Plan
from .limits import prunable_groups
from .scoring import backward, wanting_gradients


class Pruner:
    """Masks a model in place, decision by decision; for people with their own training loop.

    ```python
    pruner = nvit.Pruner(model, table, nvit.PruneConfig(latency_target=(0.5,)))
    for images, labels in loader:
        loss_fn(model(images), labels).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        if pruner.done:
            break
    small = pruner.compact()
    ```

    Or in one shot, with any criterion and `train=False`:

    ```python
    for images, labels in loader:
        pruner.score(images, labels)          # or a backward pass of your own, then pruner.observe()
    pruner.decide_at(0.5)
    ```

    Attributes:
        model: prepared and masked in place; parameter names do not change.
        call: its logits as a module; `call.model` is `model` itself, or a twin of it in shards (see `work_in`).
        criterion: what saliency is; a new one after each decision that nothing is trained before.
        masks: what is kept.
        met: targets met so far, in the order of their size.
    """

    def __init__(self, model: nn.Module, table: LatencyTable, config: PruneConfig | None = None) -> None:
        self.config = config or PruneConfig()
        self.config.check()
        adapter = adapters.find(model)
        self.model, self.table = adapter.prepare(model), table
        self.groups = adapter.groups(model, self.config.bundle_sizes)
        self.free = prunable_groups(self.groups, self.config.only, self.config.freeze, self.config.stages)
        self.call = parallel.Call(self.model, adapter.logits)
        self.params = dict(model.named_parameters())
        self.criterion = self._new_criterion()
        self.targets = sorted(self.config.latency_target, reverse=True)
        self.met: list[float] = []
        self.history: list[dict[str, Any]] = []
        self.steps = 0
        self._set_masks(full_masks(self.groups))
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

    # --- the loop -----------------------------------------------------------------------------------------------------

    def step(self, grads: Mapping[str, Tensor] | None = None) -> list[float]:
        """After `optimizer.step()`, while gradients are still there: zero what is pruned, score, decide when due.

        Returns:
            Targets met by this step.
        """
        parallel.project_(self.params, self.weight_masks)
        self.steps += 1
        if self.done:
            return []
        self.observe(grads)
        return [] if self.steps % self.config.interval else self.decide()

    def decide(self) -> list[float]:
        """Remove the bundles of lowest saliency less latency credit (Eq. 7); returns targets met by that.

        Raises:
            ValueError: only last bundles are left, or ranks disagree; no mask has changed.
        """
        config, scores = self.config, self.scores()
        masks = drop_cheapest(
            scores, self.masks, self.groups, self.table, config.bundles_per_step, config.latency_weight
        )
        if all(bool((masks[name] == keep).all()) for name, keep in self.masks.items()):
            raise ValueError(
                f"only last bundles are left at {self.ratio:.3f} of dense latency; raise the latency target"
            )
        return self._take(scores, masks)

    def decide_at(self, target: float) -> None:
        """One decision down to `target`, least saliency removed at that latency; no training in between."""
        scores = self.scores()
        masks, eta = drop_to_target(scores, self.masks, self.groups, self.table, target * self.table.dense_ms)
        self._take(scores, masks, eta=eta)

    def _take(self, scores: Mapping[str, Tensor], masks: Masks, **more: Any) -> list[float]:
        """Mask what a decision chose, once every rank has decided alike; returns targets met by that."""
        found = {f"score of {n}": s for n, s in scores.items()} | {f"mask of {n}": m for n, m in masks.items()}
        parallel.agree(f"the decision at step {self.steps}", found)
        if not self.config.train:
            self._forget()
        self._set_masks(masks)
        now = self.ratio
        self.history.append({"step": self.steps, "predicted_ratio": now} | more)
        met = [t for t in self.targets[len(self.met) :] if now <= t]
        self.met += met
        self._stop_recording_when_done()
        return met

    def _set_masks(self, masks: Masks) -> None:
        self.masks = masks
        self.weight_masks = apply_(self.call.model, self.groups, masks, parallel.project_)
        if self.criterion.open:
            self.criterion.begin(replace(self.criterion.context, model=self.call.model, masks=masks))

    # --- saliency -----------------------------------------------------------------------------------------------------

    def observe(self, grads: Mapping[str, Tensor] | None = None) -> None:
        """Add the last backward pass of your own to the saliency, from `grads` or the parameters' own gradients.

        With several ranks `grads` are the mean over all of them, as DDP and FSDP leave it.

        Raises:
            ValueError: a score is not finite, or the criterion does not read the gradients of a loss.
        """
        if not self.criterion.capabilities.training:
            raise ValueError(
                f"criterion {self.criterion.name} sends a signal of its own backward and reads no other; call "
                "score(images) in place of observe()"
            )
        self._observe(_grads(self.params) if grads is None else grads)

    def score(self, images: Tensor, labels: Tensor | None = None, plan: Plan | None = None) -> None:
        """Add a batch to the saliency: forward and, as the criterion wants it, backward. Weights stay as they are.

        The model is in eval mode afterwards. Of several ranks each gives its share of the batch.

        Args:
            labels: int64 `(batch,)`; read if the criterion reads any, and drawn from the model's own softmax where the
                config says `sampled`.
            plan: how the batch goes through the model; whole if None.

        Raises:
            ValueError: a score is not finite, or labels are missing.
            FloatingPointError: the loss or a logit is not finite.
        """
        can, sampled = self.criterion.capabilities, self.config.labels == "sampled"
        if can.labels and labels is None and not sampled:
            raise ValueError(
                f"criterion {self.criterion.name} reads labels, and none came with the images; give them, or take "
                "labels = sampled"
            )
        if not self.criterion.wants_images:
            if not self.criterion.batches:  # every batch would say the same
                self.score_weights()
            return
        if not (self.criterion.open and self.criterion.context.scoring):
            self.start_scoring()
        self.call.model.eval()
        plan = plan or Plan(weight_gradients=can.weight_gradients)
        try:
            with wanting_gradients(self.params, can.weight_gradients):
                if can.weight_gradients:
                    self.call.model.zero_grad(set_to_none=True)
                backward(self.call, self.criterion, images, None if sampled else labels, plan, self.config.seed)
                grads = _grads(self.params) if can.weight_gradients else {}
                # Shards hold the mean over ranks already.
                self._observe(grads if self.call.model is not self.model else parallel.mean(grads))
                if can.weight_gradients:
                    self.call.model.zero_grad(set_to_none=True)
        except BaseException:
            self.stop_recording()
            raise

    def score_weights(self) -> None:
        """Score what can be scored without a pass over images."""
        if not self.criterion.open:
            self.start_scoring()
        self._observe({})

    def _observe(self, grads: Mapping[str, Tensor]) -> None:
        params, grads = parallel.gathered(self.params), parallel.gathered(grads)
        self.criterion.observe(Evidence(params, grads, seed=self.config.seed, over_ranks=parallel.mean))

    def scores(self) -> dict[str, Tensor]:
        """Saliency of what may be pruned, by group, from the batches observed so far: `(group.size,)`."""
        return self.criterion.finish()

    @property
    def mean(self) -> RunningMean:
        """What batches said on average, by group; part of the run state."""
        return self.criterion.mean

    def _new_criterion(self) -> Criterion:
        return CRITERIA[self.config.saliency](self.config.momentum if self.config.train else None)

    def _forget(self) -> None:
        """What was said of a model that has not been trained since says nothing of what is left of it."""
        before, self.criterion = self.criterion, self._new_criterion()
        listening = before.open and not before.context.scoring
        before.close()
        if listening:
            self.criterion.begin(before.context)

    def start_recording(self) -> None:
        """Put captures on the model that read backward passes of your own, where the criterion needs them."""
        self._begin(scoring=False)

    def start_scoring(self, statistics: Mapping[Place, SiteStatistics] | None = None) -> None:
        """Put captures on the model for `score`; `statistics` of the model as it is, where they are known."""
        self._begin(scoring=True, statistics=statistics)

    def _begin(self, **how: Any) -> None:
        where = (self.call.model, self.free, self.masks)
        self.criterion.begin(Context(*where, seed=self.config.seed, over_ranks=parallel.mean, **how))

    def stop_recording(self) -> None:
        """Take captures off the model, if any are on it; what was observed stays. `done` does so by itself."""
        self.criterion.close()

    def _stop_recording_when_done(self) -> None:
        if self.done:
            self.stop_recording()

    # --- several processes, what is left, resumption ------------------------------------------------------------------

    def work_in(self, call: parallel.Call) -> None:
        """Train and score `call` from now on: the model itself, or a twin of it whose parameters lie in shards."""
        if call.model is not self.call.model:
            if call.model is not self.model:
                for layer in prunable_layers(call.model).values():
                    layer.unwatch_()  # the twin was copied with captures on
            self.call, self.params = call, dict(call.model.named_parameters())
            self._set_masks(self.masks)

    def unshard(self) -> None:
        """Back from shards to `model`: full weights, masked."""
        if self.call.model is not self.model:
            parallel.fill_(self.model, parallel.gathered(self.params))
            self.work_in(parallel.Call(self.model, self.call.function))

    def compact(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A narrower copy that computes what the masked model does; or with other full `weights`, as an average."""
        weights = parallel.gathered(self.params) if weights is None else weights
        return compact(self.model, self.groups, self.masks, weights).eval()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain values and tensors from which `restore` goes on."""
        values = {"met": self.met, "history": self.history, "steps": self.steps, "scored": self.mean.count}
        tensors = {f"mask.{n}": m for n, m in self.masks.items()}
        tensors |= {f"mean.{n}": s for n, s in self.mean.sums.items()}
        return {"pruner": values}, tensors

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        mine = values["pruner"]
        masks = {n.removeprefix("mask."): t for n, t in tensors.items() if n.startswith("mask.")}
        self._set_masks(masks)
        device = next(iter(self.params.values())).device
        self.mean.sums = {n.removeprefix("mean."): t.to(device) for n, t in tensors.items() if n.startswith("mean.")}
        self.mean.count, self.steps = mine["scored"], mine["steps"]
        self.met, self.history = list(mine["met"]), list(mine["history"])
        self._stop_recording_when_done()


def _grads(params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.grad for name, p in params.items() if p.grad is not None}
