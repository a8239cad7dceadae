"""A masked model and what a criterion says of it: batches in, saliency out, nothing chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .. import adapters, parallel, tasks
from ..calibration.capture import Place
from ..calibration.statistics import SiteStatistics
from ..config import PruneConfig
from ..criteria.base import Context, Criterion, Evidence, RunningMean
from ..criteria.registry import CRITERIA
from ..layers import prunable_layers
from ..spec import Group
from ..structure.masks import Masks, apply_, full_masks
from ..utils.finite import Finite
from .backward import backward, wanting_gradients
from .limits import free_groups
from .plan import Plan


class Scorer:
    """A prepared model, masked in place, and the criterion that judges its units.

    Attributes:
        model: parameter names do not change.
        call: its logits as a module; `call.model` is `model` itself, or a twin of it in shards (see `work_in`).
        task: what the model is for.
        groups, free: all of the model's, and those that may shrink.
        criterion: what saliency is.
        masks: what is kept.
    """

    def __init__(self, model: nn.Module, config: PruneConfig) -> None:
        config.check()
        adapter = adapters.find_maskable(model)
        self.config, self.model = config, adapter.prepare(model)
        self.task = tasks.settled(config, model)
        self.groups = adapter.groups(model, config.bundle_sizes)
        self.free = free_groups(self.groups, config, self.task)
        self.call = parallel.Call(self.model, adapter.logits)
        self.params = dict(model.named_parameters())
        self.criterion = self._new_criterion()
        self.finite = Finite(next(model.parameters()).device, _not_finite)
        self._set_masks(full_masks(self.groups))

    def _set_masks(self, masks: Masks) -> None:
        self.masks = masks
        self.weight_masks = apply_(self.call.model, self.groups, masks, parallel.project_)
        self.project = parallel.projection(self.params, self.weight_masks)
        if self.criterion.open:
            context = replace(self.criterion.context, model=self.call.model, groups=self._left(), masks=masks)
            self.criterion.begin(context)

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
        grads = _grads(self.params) if grads is None else grads
        if not grads:
            raise ValueError(
                "no parameter has a gradient: call pruner.step() after optimizer.step() and before "
                "optimizer.zero_grad(), which takes the gradients away"
            )
        self._observe(grads)

    def score(self, images: Tensor, labels: Tensor | None = None, plan: Plan | None = None) -> None:
        """Add a batch to the saliency: forward and, as the criterion wants it, backward. Weights stay as they are.

        The model is in eval mode afterwards. Of several ranks each gives its share of the batch.

        Args:
            labels: as the task has them, int64 `(batch,)` for classification; read if the criterion reads any, and
                drawn from what the model itself says where the config says `sampled`.
            plan: how the batch goes through the model; whole if None.

        Raises:
            ValueError: a score is not finite, or labels are missing.
            FloatingPointError: the loss or a logit is not finite. Off the CPU `scores` raises it.
        """
        can, sampled = self.criterion.capabilities, self.config.labels == "sampled" or not self.task.reads_labels
        if can.labels and labels is None and not sampled:
            raise ValueError(
                f"criterion {self.criterion.name} reads labels, and none came with the images; give them, or take "
                "labels = sampled"
            )
        if not self.criterion.wants_images:
            if not self.criterion.batches:  # every batch would say the same
                self.score_weights()
            return
        labels = self.task.labels(images, labels) if can.labels and not sampled else None
        if not (self.criterion.open and self.criterion.context.scoring):
            self.start_scoring()
        self.call.model.eval()
        plan = plan or Plan(weight_gradients=can.weight_gradients)
        try:
            with wanting_gradients(self.params, can.weight_gradients):
                if can.weight_gradients:
                    self.call.model.zero_grad(set_to_none=True)
                backward(self.call, self.criterion, self.task, images, labels, plan, self.config.seed, self.finite)
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
        """Saliency of what may be pruned, by group, from the batches observed so far: `(group.size,)`.

        Raises:
            ValueError: no batch was observed, or a score is not finite.
            FloatingPointError: the loss or a logit of a batch was not finite.
        """
        self.finite.check()
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
        where = (self.call.model, self._left(), self.masks)
        self.criterion.begin(Context(*where, seed=self.config.seed, over_ranks=parallel.mean, task=self.task, **how))

    def _left(self) -> list[Group]:
        """The free groups that did not leave whole."""
        return [g for g in self.free if bool(self.masks[g.name].any())]

    def stop_recording(self) -> None:
        """Take captures off the model, if any are on it; what was observed stays. `done` does so by itself."""
        self.criterion.close()

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


def _not_finite(batch: int, loss: float) -> str:
    return f"the loss is {loss} on scoring batch {batch}; check the data"


def _grads(params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.grad for name, p in params.items() if p.grad is not None}
