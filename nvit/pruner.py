"""The loop: train, score, decide, until the latency target is met (arXiv:2110.04869, Sec. 3.2)."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import adapters, snapshot
from .config import KINDS, PruneConfig
from .data import endless
from .distill import Objective, frozen
from .latency import LatencyTable, current_setting
from .masks import Masks, apply_, compact, full_masks, project_, widths
from .oneshot import prune_one_shot
from .progress import Progress, silent
from .saliency import CRITERIA, Evidence, GateRecorder, RunningMean
from .selection import drop_cheapest, drop_to_target
from .spec import Group
from .training import Trainer


def prunable_groups(groups: Sequence[Group], only: Sequence[str], freeze: Sequence[str]) -> list[Group]:
    """The groups a user allows to shrink.

    Raises:
        ValueError: a pattern of `freeze` matches no group, or nothing is left.
    """
    for pattern in freeze:
        if not fnmatch.filter([g.name for g in groups], pattern):
            raise ValueError(f"freeze: {pattern!r} matches no group; groups are named like emb, blocks.0.mlp")
    free = [g for g in groups if not any(fnmatch.fnmatch(g.name, p) for p in freeze) and g.kind in (only or KINDS)]
    if not free:
        raise ValueError(f"nothing is left to prune with only={list(only)} and freeze={list(freeze)}")
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
        masks: what is kept.
        met: targets met so far, in the order of their size.
    """

    def __init__(self, model: nn.Module, table: LatencyTable, config: PruneConfig | None = None) -> None:
        self.config = config or PruneConfig()
        self.config.check()
        adapter = adapters.find(model)
        self.model, self.table = adapter.prepare(model), table
        self.groups = adapter.groups(model, self.config.bundle_sizes)
        self.free = prunable_groups(self.groups, self.config.only, self.config.freeze)
        self.params = dict(model.named_parameters())
        self.criterion = CRITERIA.get(self.config.criterion)  # None for `remaining`, see `nvit.oneshot`
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
            self._record_gates()

    def _record_gates(self) -> None:
        self.gates = GateRecorder(self.model, self.free, self.masks)
        self.gates.__enter__()

    def _set_masks(self, masks: Masks) -> None:
        self.masks = masks
        self.weight_masks = apply_(self.model, self.groups, masks)
        if self.gates is not None:
            self.gates.masks = masks

    @property
    def ratio(self) -> float:
        """Predicted latency as a fraction of dense."""
        return self.table.ratio(widths(self.groups, self.masks))

    @property
    def done(self) -> bool:
        """Whether every target is met."""
        return len(self.met) == len(self.targets)

    def observe(self, grads: Mapping[str, Tensor] | None = None) -> None:
        """Add the last backward pass to the saliency, from `grads` or the parameters' own gradients.

        Raises:
            ValueError: a score is not finite.
        """
        if grads is None:
            grads = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        seen = Evidence(self.params, grads, None if self.gates is None else self.gates.pop(), self.config.seed)
        self.mean.update(self.criterion.score(self.free, seen))

    def step(self, grads: Mapping[str, Tensor] | None = None) -> list[float]:
        """After `optimizer.step()`, while gradients are still there: zero what is pruned, score, decide when due.

        Returns:
            Targets met by this step.
        """
        project_(self.params, self.weight_masks)
        self.steps += 1
        if self.done:
            return []
        self.observe(grads)
        if self.steps % self.config.interval:
            return []
        masks = drop_cheapest(
            self.mean.value(),
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
        self._set_masks(masks)
        return self._note()

    def decide_at(self, target: float) -> None:
        """One decision down to `target`, least saliency removed at that latency; no training in between."""
        masks, eta = drop_to_target(
            self.mean.value(), self.masks, self.groups, self.table, target * self.table.dense_ms
        )
        self._set_masks(masks)
        self._note(eta=eta)

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

    def stop_recording(self) -> None:
        """Take the taps off the model, if any are on it; `done` does so by itself."""
        if self.gates is not None:
            self.gates.__exit__()
            self.gates = None

    def compact(self) -> nn.Module:
        """A narrower copy that computes what the masked model does."""
        return compact(self.model, self.groups, self.masks).eval()

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


@dataclass
class Pruned:
    """A compact model at one target."""

    target: float
    model: nn.Module
    predicted_ratio: float
    metrics: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write the snapshot folder."""
        plain = {"target": self.target, "predicted_ratio": self.predicted_ratio} | self.metrics
        return snapshot.save(path, self.model, plain)


@dataclass
class PruneResult:
    """What `prune` returns.

    Attributes:
        snapshots: a compact model for each target, largest first.
        masks: of the last one, on the dense model.
        history: a row per decision.
        table: the latency table that decided.
        dense: a copy of the model as it was given.
    """

    snapshots: list[Pruned]
    masks: Masks
    history: list[dict[str, Any]]
    table: LatencyTable
    dense: nn.Module

    @property
    def model(self) -> nn.Module:
        """The compact model at the smallest target."""
        return self.snapshots[-1].model

    def save(self, path: str | Path) -> Path:
        """Write the snapshot folder of the smallest target; `snapshots[i].save` writes another."""
        return self.snapshots[-1].save(path)


def prune(
    model: nn.Module,
    loader,
    config: PruneConfig | None = None,
    table: LatencyTable | None = None,
    *,
    cnn_teacher: nn.Module | None = None,
    renormalise=None,
    out: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> PruneResult:
    """Prune `model` to `config.latency_target`: the paper's iterative loop, or one shot with `train=False`.

    `model` is masked (and trained) in place and computes what the last compact model does afterwards.

    Args:
        model: a model of a supported family, on the device to train on.
        loader: batches `(images, labels)`, sized.
        table: measured on the model's device at the loader's batch size when None.
        cnn_teacher: any timm model for the hard labels of L_CNN; `renormalise` as `distill.renormalisation` gives it.
        out: a folder for the run state and, as soon as a target is met, its snapshot.
        resume: go on from the run state in `out`, if there is one.

    Raises:
        ValueError: an unsupported model, a table of another model or setting, a target that cannot be met.
        FloatingPointError: the loss or a gradient is not finite; the last run state stays on disk.
    """
    config = config or PruneConfig()
    config.check()
    device = next(model.parameters()).device
    adapters.find(model).prepare(model)
    dense = frozen(copy.deepcopy(model))
    if table is None:
        table = LatencyTable.measure(model, config.batch_size, device, bundle_sizes=config.bundle_sizes)
    if table.setting is not None:
        s = table.setting
        here = current_setting(device, getattr(torch, s.dtype), s.batch_size, adapters.find(model).tokens(model))
        table.check(here, table.dense)
    pruner = Pruner(model, table, config)
    keep = _Keeper(out, resume)
    if config.train:
        objective = Objective.of(config, dense if config.distill_weight else None, cnn_teacher, renormalise)
        try:
            snapshots = _prune_training(pruner, loader, objective, keep, progress)
        finally:
            pruner.stop_recording()
    else:
        snapshots = prune_one_shot(pruner, loader, keep, progress)
    return PruneResult(snapshots, pruner.masks, pruner.history, table, dense)


class _Keeper:
    """Where a run keeps its snapshots and state, if anywhere."""

    def __init__(self, out: Path | None, resume: bool) -> None:
        self.out, self.resume = out, resume
        self.state_file = None if out is None else out / "run_state.safetensors"

    def folder(self, target: float) -> Path:
        return self.out / f"target-{target:g}"

    def resumable(self) -> bool:
        return self.resume and self.state_file is not None and self.state_file.exists()

    def take(self, pruner: Pruner, target: float, model: nn.Module) -> Pruned:
        pruned = Pruned(target, model, pruner.ratio)
        if self.out is not None:
            pruned.save(self.folder(target))
        return pruned

    def again(self, targets: Sequence[float], device: torch.device) -> list[Pruned]:
        """Snapshots of targets met before the interruption."""
        found = []
        for target in targets:
            folder = self.folder(target)
            metrics = snapshot.load_metrics(folder)
            found.append(Pruned(target, snapshot.load(folder, device), metrics["predicted_ratio"]))
        return found


def _prune_training(pruner: Pruner, loader, objective: Objective, keep: _Keeper, progress: Progress) -> list[Pruned]:
    config = pruner.config
    trainer = Trainer(pruner.model, objective, config, config.lr, keep.state_file)
    snapshots: list[Pruned] = []
    if keep.resumable():
        tensors, values = trainer.load()
        pruner.restore(values, tensors)
        snapshots = keep.again(pruner.met, next(pruner.model.parameters()).device)
    last = pruner.targets[-1]
    if pruner.done:
        return snapshots
    for _, (images, labels) in endless(loader, config.seed, trainer.step):
        loss = trainer.train_step(images, labels)
        met = [] if trainer.skipped else pruner.step(trainer.grads())
        trainer.after_step()
        progress(
            round(1000 * (1 - pruner.ratio)), round(1000 * (1 - last)), f"prune: {pruner.ratio:.3f}, loss {loss:.3f}"
        )
        for target in met:
            small = (
                pruner.compact() if trainer.ema is None else compact(trainer.averaged(), pruner.groups, pruner.masks)
            )
            snapshots.append(keep.take(pruner, target, small))
        if met or trainer.due():
            trainer.save(*pruner.state())
        if pruner.done:
            return snapshots
    raise AssertionError("an endless loader ended")
