"""The masks of a model under pruning: what the saliency is, which units leave, when a target is met."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import adapters, parallel
from ..config import PruneConfig
from ..criteria.base import Evidence, RunningMean
from ..criteria.gates import GateRecorder
from ..criteria.registry import CRITERIA
from ..latency.table import LatencyTable
from ..selection.greedy import drop_cheapest
from ..selection.lagrangian import drop_to_target
from ..spec import KINDS, Group
from ..structure.compact import compact
from ..structure.masks import Masks, apply_, full_masks, widths


def prunable_groups(
    groups: Sequence[Group], only: Sequence[str], freeze: Sequence[str], stages: Sequence[int] = ()
) -> list[Group]:
    """The groups a user allows to shrink.

    Args:
        stages: counted as the residual streams are, from 0; all if empty.

    Raises:
        ValueError: a pattern of `freeze` matches no group, a stage does not exist, or nothing is left.
    """
    streams = [g.blocks for g in groups if g.kind == "emb"]
    for stage in stages:
        if not 0 <= stage < len(streams):
            has = f"the stages 0 to {len(streams) - 1}" if len(streams) > 1 else "one stage, 0"
            raise ValueError(f"stages: there is no stage {stage}; this model has {has}")
    inside = {b for stage in stages or range(len(streams)) for b in streams[stage]}
    for pattern in freeze:
        if not fnmatch.filter([g.name for g in groups], pattern):
            raise ValueError(f"freeze: {pattern!r} matches no group; groups are named like emb, blocks.0.mlp")
    allowed = [g for g in groups if g.kind in (only or KINDS) and inside.issuperset(g.blocks)]
    free = [g for g in allowed if not any(fnmatch.fnmatch(g.name, p) for p in freeze)]
    if not free:
        found = f"only={list(only)}, freeze={list(freeze)} and stages={list(stages)}"
        raise ValueError(f"nothing is left to prune with {found}")
    return free


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

    Attributes:
        model: prepared and masked in place; parameter names do not change.
        call: its logits as a module; `call.model` is `model` itself, or a twin of it in shards (see `work_in`).
        masks: what is kept.
        met: targets met so far, in the order of their size.
    """

    def __init__(self, model: nn.Module, table: LatencyTable, config: PruneConfig | None = None) -> None:
        self.config = config or PruneConfig()
        self.config.check()
        adapter = adapters.find_maskable(model)
        self.model, self.table = adapter.prepare(model), table
        self.groups = adapter.groups(model, self.config.bundle_sizes)
        self.free = prunable_groups(self.groups, self.config.only, self.config.freeze, self.config.stages)
        self.call = parallel.Call(self.model, adapter.logits)
        self.params = dict(model.named_parameters())
        self.criterion = CRITERIA.get(self.config.saliency)  # None for those of `nvit.oneshot`
        self.targets = sorted(self.config.latency_target, reverse=True)
        self.met: list[float] = []
        self.history: list[dict[str, Any]] = []
        self.steps = 0
        self.mean = RunningMean(self.config.momentum if self.config.train else None)
        self.gates: GateRecorder | None = None
        self._set_masks(full_masks(self.groups))
        if self.table.dense != widths(self.groups, self.masks):
            raise ValueError(
                f"the latency table is for a model whose first block is {self.table.dense[0]}; this model's is "
                f"{widths(self.groups, self.masks)[0]}. Measure a table for this model."
            )
        if self.config.train and self.criterion.reads == "gates":
            self.start_recording()

    def _set_masks(self, masks: Masks) -> None:
        self.masks = masks
        self.weight_masks = apply_(self.call.model, self.groups, masks, parallel.project_)
        if self.gates is not None:
            self.gates.masks = masks

    def work_in(self, call: parallel.Call) -> None:
        """Train and score `call` from now on: the model itself, or a twin of it whose parameters lie in shards."""
        if call.model is not self.call.model:
            recording = self.gates is not None
            self.stop_recording()
            self.call, self.params = call, dict(call.model.named_parameters())
            self._set_masks(self.masks)
            if recording:
                self.start_recording()

    def come_home(self) -> None:
        """Back from shards to `model`: full weights, masked."""
        if self.call.model is not self.model:
            parallel.fill_(self.model, parallel.gathered(self.params))
            self.work_in(parallel.Call(self.model, self.call.function))

    @property
    def ratio(self) -> float:
        """Predicted latency as a fraction of dense."""
        return self.table.ratio(widths(self.groups, self.masks))

    @property
    def done(self) -> bool:
        """Whether every target is met."""
        return len(self.met) == len(self.targets)

    def observe(self, grads: Mapping[str, Tensor] | None = None, gates: Mapping[str, Tensor] | None = None) -> None:
        """Add the last backward pass to the saliency, from `grads` or the parameters' own gradients.

        With several ranks `grads` are the mean over all of them, as DDP and FSDP leave it.

        Args:
            gates: recorded already, as `GateRecorder.pop` gives them.

        Raises:
            ValueError: a score is not finite, or the criterion is not observed batch by batch.
        """
        if self.criterion is None:
            raise ValueError(
                f"criterion {self.config.saliency} is not observed batch by batch; give the model to nvit.prune, "
                "or take criterion fisher"
            )
        if grads is None:
            grads = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        if gates is None and self.gates is not None:
            gates = self.gates.pop()
        params, grads = parallel.gathered(self.params), parallel.gathered(grads)
        seen = Evidence(params, grads, gates, self.config.seed, parallel.mean)
        self.mean.update(self.criterion.score(self.free, seen))

    def scores(self) -> dict[str, Tensor]:
        """Saliency of what may be pruned, by group, from the batches observed so far: `(group.size,)`."""
        mean = self.mean.value()
        return mean if self.criterion is None else self.criterion.scores(mean)

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
        if self.steps % self.config.interval:
            return []
        scores = self.scores()
        masks = drop_cheapest(
            scores,
            self.masks,
            self.groups,
            self.table,
            self.config.bundles_per_step,
            self.config.latency_weight,
        )
        if all(bool((masks[name] == keep).all()) for name, keep in self.masks.items()):
            raise ValueError(
                f"only last bundles are left at {self.ratio:.3f} of dense latency; raise the latency target"
            )
        self._agree(scores, masks)
        self._set_masks(masks)
        return self._note()

    def decide_at(self, target: float) -> None:
        """One decision down to `target`, least saliency removed at that latency; no training in between."""
        scores = self.scores()
        masks, eta = drop_to_target(scores, self.masks, self.groups, self.table, target * self.table.dense_ms)
        self._agree(scores, masks)
        self._set_masks(masks)
        self._note(eta=eta)

    def _agree(self, scores: Mapping[str, Tensor], masks: Masks) -> None:
        """Raise ValueError, before anything is masked, unless every rank decides alike."""
        found = {f"score of {n}": s for n, s in scores.items()} | {f"mask of {n}": m for n, m in masks.items()}
        parallel.agree(f"the decision at step {self.steps}", found)

    def _note(self, **more: Any) -> list[float]:
        now = self.ratio
        self.history.append({"step": self.steps, "predicted_ratio": now} | more)
        met = [t for t in self.targets[len(self.met) :] if now <= t]
        self.met += met
        self._stop_recording_when_done()
        return met

    def _stop_recording_when_done(self) -> None:
        if self.done:
            self.stop_recording()

    def start_recording(self) -> None:
        """Put taps on the model that read gate gradients, until `stop_recording`."""
        self.gates = GateRecorder(self.call.model, self.free, self.masks)
        self.gates.__enter__()

    def stop_recording(self) -> None:
        """Take the taps off the model, if any are on it; `done` does so by itself."""
        if self.gates is not None:
            self.gates.__exit__()
            self.gates = None

    def compact(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A narrower copy that computes what the masked model does; or with other full `weights`, as an average."""
        weights = parallel.gathered(self.params) if weights is None else weights
        return compact(self.model, self.groups, self.masks, weights).eval()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain values and tensors from which `restore` goes on."""
        values = {"met": self.met, "history": self.history, "steps": self.steps, "scored": self.mean.count}
        tensors = {f"mask.{n}": m for n, m in self.masks.items()} | {f"mean.{n}": s for n, s in self.mean.sums.items()}
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
