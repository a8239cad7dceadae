"""A run: train, score, decide, until every latency target is met (arXiv:2110.04869, Sec. 3.2); or in one shot."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import adapters, parallel
from ..config import PruneConfig
from ..latency.clock import current_setting
from ..latency.table import LatencyTable
from ..structure import snapshot
from ..structure.masks import Masks
from ..training.data import endless
from ..training.distill import Objective, frozen
from ..training.trainer import Trainer
from ..utils.progress import Progress, silent
from .budget import Budget
from .oneshot import prune_one_shot
from .pruner import Pruner


@dataclass
class Pruned:
    """A compact model at one target."""

    target: float
    model: nn.Module
    predicted_ratio: float
    metrics: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write the snapshot folder (of several ranks, the first does)."""
        if not parallel.main():
            return Path(path)
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
        dense: a copy of the model as it was given; None under a budget, which is not spent on one.
        memory: under a budget, what `Budget.report` says.
        criterion: what the saliency was.
    """

    snapshots: list[Pruned]
    masks: Masks
    history: list[dict[str, Any]]
    table: LatencyTable
    dense: nn.Module | None
    memory: dict[str, Any] | None = None
    criterion: str = ""

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

    `model` is masked (and trained) in place and computes what the last compact model does afterwards. Called by every
    process that torchrun started, it is one run of all of them: same masks and models on every rank, files by rank 0.

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
        parallel.RankLost: another process is gone; the last run state is on disk.
    """
    parallel.join()
    config = config or PruneConfig()
    config.check()
    device = next(model.parameters()).device
    adapter = adapters.find(model)
    adapter.prepare(model)
    budget = Budget(config.budget, device) if config.budget else None
    config = config.over_ranks(parallel.world())
    parallel.same_weights_(model)
    dense = None if budget else frozen(copy.deepcopy(model))
    if table is None:
        table = parallel.from_main(
            lambda: LatencyTable.measure(model, config.batch_size, device, bundle_sizes=config.bundle_sizes)
        )
    if table.setting is not None:
        s = table.setting
        here = current_setting(device, getattr(torch, s.dtype), s.batch_size, adapter.tokens(model))
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
        if config.fsdp and parallel.world() > 1:
            pruner.work_in(parallel.shard(model, adapter.logits))
        with parallel.watch():
            snapshots = prune_one_shot(pruner, loader, keep, budget, progress)
    pruner.unshard()
    memory = budget.report() if budget else None
    return PruneResult(snapshots, pruner.masks, pruner.history, table, dense, memory, config.saliency)


class _Keeper:
    """Where a run keeps its snapshots and state, if anywhere."""

    def __init__(self, out: Path | None, resume: bool) -> None:
        self.out, self.resume = out, resume
        self.state_file = None if out is None else out / "run_state.safetensors"

    def folder(self, target: float) -> Path:
        return self.out / f"target-{target:g}"

    def resumable(self) -> bool:
        return parallel.from_main(lambda: self.resume and self.state_file is not None and self.state_file.exists())

    def take(self, pruner: Pruner, target: float, model: nn.Module) -> Pruned:
        pruned = Pruned(target, model, pruner.ratio)
        if self.out is not None:
            parallel.from_main(lambda: pruned.save(self.folder(target)))
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
    pruner.work_in(trainer.call)
    snapshots: list[Pruned] = []
    if keep.resumable():
        tensors, values = trainer.load()
        pruner.restore(values, tensors)
        snapshots = keep.again(pruner.met, next(pruner.model.parameters()).device)
    last = pruner.targets[-1]
    if pruner.done:
        return snapshots
    with trainer.surviving(pruner.state):
        for _, (images, labels) in endless(loader, config.seed, trainer.step):
            loss = trainer.train_step(images, labels)
            met = [] if trainer.skipped else pruner.step(trainer.grads())
            trainer.after_step()
            so_far = f"prune: {pruner.ratio:.3f}, loss {loss:.3f}"
            progress(round(1000 * (1 - pruner.ratio)), round(1000 * (1 - last)), so_far)
            for target in met:
                small = pruner.compact(None if trainer.ema is None else trainer.weights())
                snapshots.append(keep.take(pruner, target, small))
            if met or trainer.due():
                trainer.save(*pruner.state())
            if pruner.done:
                return snapshots
    raise AssertionError("an endless loader ended")
