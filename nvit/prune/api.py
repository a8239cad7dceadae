"""A run: train, score, decide, until every latency target is met (arXiv:2110.04869, Sec. 3.2); or in one shot."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import adapters, parallel, tasks
from ..config import PruneConfig
from ..latency.clock import current_setting, time_rounds
from ..latency.table import LatencyTable
from ..training.batches import Loader
from ..training.data import endless
from ..training.distill import Objective, frozen
from ..training.finetune import finetune
from ..training.trainer import Trainer
from ..utils.logs import Log, Rate, unlogged
from ..utils.memory import Meter
from ..utils.progress import Progress, showing, silent
from .budget import Budget
from .folder import RunFolder
from .joint import prune_with_tokens
from .oneshot import prune_one_shot
from .polish import polish_snapshots
from .pruner import Pruner
from .result import Pruned, PruneResult
from .sample import refuse_few
from .timing import Timer
from .tokens import check_merging


@showing
def prune(
    model: nn.Module,
    loader: Loader,
    config: PruneConfig | None = None,
    table: LatencyTable | None = None,
    *,
    cnn_teacher: nn.Module | None = None,
    renormalise: tuple[Tensor, Tensor] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    meter: Meter | None = None,
    timer: Timer = time_rounds,
    progress: Progress | bool = silent,
    log: Log = unlogged,
) -> PruneResult:
    """Prune `model` to `config.latency_target`: the paper's iterative loop, or one shot with `train=False`.

    `model` is masked (and trained) in place and computes what the last compact model does afterwards, or did before it
    was polished. Called by every
    process that torchrun started, it is one run of all of them: same masks and models on every rank, files by rank 0.

    Args:
        model: a model of a supported family, on the device to train on.
        loader: batches `(images, labels)`, sized.
        table: measured on the model's device at the loader's batch size when None.
        cnn_teacher: any timm model for the hard labels of L_CNN; `renormalise` as `distill.renormalisation` gives it.
        out: a folder for the run state and, as soon as a target is met, its snapshot; see `RunFolder`.
        resume: go on from the run state in `out`, if there is one.
        meter: of the memory under a budget, where the caller measures already; the peak is then the caller's too.
        timer: what measures compact models, see `Pruner`; a budget leaves no room for it.
        progress: a callback; True shows what the command shows, a bar with the stage and its loss.
        log: called with numbers of the run as it goes, see `utils.logs`.

    Raises:
        ValueError: an unsupported model, a table of another model or setting, a target that cannot be met.
        FloatingPointError: the loss or a gradient is not finite; the last run state stays on disk.
        parallel.RankLost: another process is gone; the last run state is on disk.

    >>> model = nvit.load(nvit.BUNDLED)  # or any timm ViT
    >>> loader = nvit.data.TrainingData(nvit.data.Digits(training=True), batch_size=32)
    >>> config = nvit.PruneConfig(latency_target=0.7, train=False, refit=True, score_batches=2)
    >>> result = nvit.prune(model, loader, config, nvit.LatencyTable.analytic(model))
    >>> result.snapshots[0].predicted_ratio <= 0.7
    True
    """
    parallel.join()
    config = config or PruneConfig()
    config.check()
    refuse_few(loader, config)
    device = next(model.parameters()).device
    adapter = adapters.find_maskable(model)
    adapter.prepare(model)
    tasks.settled(config, model)  # before a table is measured
    check_merging(model, config)
    budget = Budget(config.budget, device, meter) if config.budget else None
    config = config.over_ranks(parallel.world())
    parallel.same_weights_(model)
    dense = None if budget else frozen(copy.deepcopy(model))
    pruner = Pruner(model, _checked(table, model, config, progress), config, timer=None if budget else timer)
    pruner.check_targets()
    folder = RunFolder(out, resume)
    if config.train:
        objective = Objective.of(
            config, pruner.task, dense if config.distill_weight else None, cnn_teacher, renormalise
        )
        try:
            snapshots = _prune_training(pruner, loader, objective, folder, progress, log)
        finally:
            pruner.stop_recording()
    elif config.merges_tokens:
        snapshots = prune_with_tokens(pruner, loader, folder, progress, log)
    else:
        if config.fsdp and parallel.world() > 1:
            pruner.work_in(parallel.shard(model, adapter.logits))
        with parallel.watch():
            snapshots = prune_one_shot(pruner, loader, folder, budget, progress, log)
    pruner.unshard()
    if config.polish:
        pruner.history += polish_snapshots(snapshots, dense, loader, config, folder, progress, log)
    memory = budget.report() if budget else None
    return PruneResult(snapshots, pruner.masks, pruner.history, pruner.table, dense, memory, config.saliency)


def _checked(
    table: LatencyTable | None, model: nn.Module, config: PruneConfig, progress: Progress = silent
) -> LatencyTable:
    """The table, measured where there is none (by rank 0, for all).

    Raises:
        ValueError: it was measured in another setting.
    """
    device = next(model.parameters()).device
    if table is None:
        progress(0, 0, "measuring latency, about 40 s")
        table = parallel.from_main(
            lambda: LatencyTable.measure(model, config.batch_size, device, bundle_sizes=config.bundle_sizes)
        )
    if table.setting is not None:
        s = table.setting
        dtype, tokens = getattr(torch, s.dtype), adapters.find(model).tokens(model)
        here = current_setting(device, dtype, s.batch_size, tokens, s.mode, s.runtime)  # timed as the table was
        table.check(here, table.dense)
    return table


def _prune_training(
    pruner: Pruner, loader: Loader, objective: Objective, folder: RunFolder, progress: Progress, log: Log
) -> list[Pruned]:
    config, rate = pruner.config, Rate()
    trainer = Trainer(
        pruner.model,
        objective,
        config,
        config.lr,
        folder.state_file,
        observe=lambda grads: None if pruner.done else pruner.observe(grads),
        constrain=lambda: pruner.project(),
        replayed=lambda: pruner.criterion.replayed(),
    )
    if trainer.note:
        progress(0, 0, trainer.note)
    pruner.work_in(trainer.call)
    snapshots: list[Pruned] = []
    if folder.resumable():
        tensors, values = trainer.load()
        pruner.restore(values, tensors)
        snapshots = folder.again(pruner, next(pruner.model.parameters()).device)
    last = pruner.targets[-1]
    if pruner.done:
        return snapshots
    with trainer.surviving(pruner.state):
        for _, (images, labels) in endless(loader, config.seed, trainer.step):
            trainer.train_step(images, labels)
            rate.images += len(images) * parallel.world()
            deciding = pruner.deciding and not trainer.skipped
            loss = trainer.look() if deciding or trainer.look_due else None
            met = [] if trainer.skipped else pruner.advance()
            if deciding:
                trainer.masks_changed()
            trainer.after_step()
            if loss is not None:
                so_far = f"prune: {pruner.ratio:.3f}, loss {loss:.3f}"
                progress(round(1000 * (1 - pruner.ratio)), round(1000 * (1 - last)), so_far)
                seen = {"loss": loss, "ratio": pruner.ratio, "images_per_s": rate.read()}
                log("prune", trainer.step, seen | (pruner.mean_widths() if deciding else {}))
            for target in met:
                small = pruner.compact(None if trainer.ema is None else trainer.weights())
                snapshots.append(folder.take(pruner, target, small))
            if met or trainer.due():
                trainer.save(*pruner.state())
            if pruner.done:
                return snapshots
    raise AssertionError("an endless loader ended")


def finetune_snapshots(
    result: PruneResult,
    loader: Loader,
    config: PruneConfig,
    *,
    cnn_teacher: nn.Module | None = None,
    renormalise: tuple[Tensor, Tensor] | None = None,
    folder: RunFolder | None = None,
    progress: Progress = silent,
    log: Log = unlogged,
) -> None:
    """Train every snapshot of `result` further, in its place, for `config.finetune_epochs`, the unpruned model its
    teacher; one that an interrupted run has trained already is left as it is.

    Args:
        loader: batches `(images, labels)`, sized, augmented as wished.
        folder: where each is written again once it is trained, and the states meanwhile; nowhere if None.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; the last state stays on disk.
    """
    folder, finetuning = folder or RunFolder(), config.finetuning()
    for pruned in result.snapshots:
        if pruned.metrics.get("finetuned_epochs") == config.finetune_epochs:
            continue
        pruned.model = finetune(
            pruned.model.train(),
            loader,
            finetuning,
            teacher=result.dense if finetuning.distill_weight else None,
            cnn_teacher=cnn_teacher,
            renormalise=renormalise,
            state_file=folder.finetune_state(pruned.target),
            resume=folder.resume,
            progress=progress,
            log=lambda _, step, values, at=pruned.target: log(f"finetune_{at:g}", step, values),
        )
        pruned.metrics["finetuned_epochs"] = config.finetune_epochs
        folder.save(pruned)
