"""`nvit prune`: dense accuracy, pruning, finetuning, accuracy and latency of each snapshot."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from .. import adapters, parallel, tasks
from ..analysis import compare
from ..analysis.evaluate import accuracy
from ..analysis.share import kept
from ..config import PruneConfig
from ..latency.measure import sample_images
from ..latency.table import LatencyTable
from ..prune.aim import Reading
from ..prune.api import finetune_snapshots, prune
from ..prune.budget import Budget
from ..prune.budget import show as show_bytes
from ..prune.folder import RunFolder
from ..prune.joint import MERGED
from ..prune.result import PruneResult
from ..prune.sample import count_images, refuse_few
from ..prune.tokens import check_merging
from ..structure.masks import unmasked_
from ..training.data import TrainingData
from ..training.images import DigitImages, Images
from ..training.targets import TargetImages
from ..utils import logs
from ..utils.logs import Log, unlogged
from ..utils.memory import Meter
from ..utils.progress import Progress
from ..utils.report import show
from ..utils.stages import Stage
from .advice import few_images, ways_back
from .command import flat
from .dry_run import Plan, Work, plan
from .flags.prune import PruneCommand
from .inputs import open_images
from .models import open_cnn_teacher, open_model, untrained
from .progress import say, shown
from .tables import in_words, measured_on, open_table


@dataclass(frozen=True)
class Opened:
    """What a run works on. `meter` measures the memory of the whole run, under a budget; `config` has the targets as
    fractions; `measuring` is how many seconds of the opening a new latency table took."""

    model: nn.Module
    images: Images | TargetImages | DigitImages
    loader: TrainingData
    evaluation: DataLoader | None
    meter: Meter | None
    table: LatencyTable
    config: PruneConfig
    cnn_teacher: nn.Module | None
    renormalise: Any
    measuring: float


def _open(command: PruneCommand, folder: RunFolder, progress: Progress) -> Opened:
    config = command.config
    config.over_ranks(parallel.world())
    torch.manual_seed(config.seed)  # of a model without weights of its own
    model = open_model(command.model, command.opening, command.machine.pick())
    # What is not here or cannot be done is refused before all else.
    command.latency.deployed(next(model.parameters()).device)
    adapters.find_maskable(model)
    tasks.settled(config, model)
    check_merging(model, config)
    images = open_images(
        model,
        command.where,
        task=config.task,
        witness="never" if untrained(command.model, command.opening) else "always",
    )
    loader = images.training(config) if config.train else images.calibration(config)
    refuse_few(loader, config)
    if line := few_images(config, count_images(loader, config)):
        say(line)
    meter = Meter(next(model.parameters()).device) if config.budget else None
    batch_size = _evaluation_batch(model, command, meter) if meter else config.batch_size

    measuring = time.monotonic()

    def measured() -> LatencyTable:
        table = open_table(model, command.latency, config.bundle_sizes, progress)
        command.with_targets(model, table)  # what cannot be met is refused before anything is written
        return table

    table = folder.table(measured)
    measuring = time.monotonic() - measuring
    config = command.with_targets(model, table)
    evaluation = images.evaluation(batch_size, command.where.eval_images)
    teacher = open_cnn_teacher(config.cnn_teacher, model)
    return Opened(model, images, loader, evaluation, meter, table, config, *teacher, measuring)


def _evaluation_batch(model: nn.Module, command: PruneCommand, meter: Meter) -> int:
    """Images a forward pass while evaluating under a budget: as many as fit in it beside compact models.

    Raises:
        ValueError: the batch of the latency measurement does not fit.
    """
    config, latency_batch = command.config, command.latency.latency_batch
    fits = Budget(config.budget, meter.device, meter).forward_images
    absolute = len(command.latency_ms) + len(command.images_per_second)  # nobody knows yet how small: less than dense
    size, targets = adapters.preprocess(model)["input_size"], absolute or sum(config.latency_target)
    if (most := fits(model, size, latency_batch, targets)) < latency_batch:
        raise ValueError(
            f"budget {config.budget} does not hold {latency_batch} images while latency is measured; give "
            + (f"--latency-batch {most} or less, or a larger budget" if most else "a larger budget")
        )
    return max(1, fits(model, size, config.batch_size, targets))


def plan_prune(command: PruneCommand, progress: Progress) -> Plan:
    """What `run_prune` would take; nothing is written, but for a latency table in the cache."""
    start = time.monotonic()
    RunFolder(command.out, command.resume).begin()
    if parallel.world() > 1:
        raise ValueError("--dry-run runs in one process; start it without torchrun")
    opened = _open(command, RunFolder(), progress)
    training = opened.images.training(opened.config) if opened.config.finetune_epochs else None
    took = time.monotonic() - start
    looked = min(opened.measuring, command.latency.latency_seconds / 20)  # a table at hand is looked at, not measured
    given = (opened.model, opened.loader, training, opened.evaluation, opened.table, opened.config)
    latency = (command.latency.latency_batch, command.latency.latency_seconds)
    teachers = (opened.cnn_teacher, opened.renormalise)
    return plan(Work(command.model, *given, took - opened.measuring + looked, *latency, *teachers))


def run_prune(command: PruneCommand, progress: Progress, log: Log = unlogged) -> dict[str, Any]:
    """What goes into result.json; of several ranks, each of which prunes and finetunes, rank 0 alone measures,
    evaluates, writes and has it."""
    start = time.monotonic()
    folder = RunFolder(command.out, command.resume)
    folder.begin()
    opened = _open(command, folder, progress)
    config, teacher = opened.config, {"cnn_teacher": opened.cnn_teacher, "renormalise": opened.renormalise}
    dense = compare.size(opened.model) | {"latency_ms": None} | _quality(opened.model, opened.model, opened, progress)
    result = prune(
        opened.model,
        opened.loader,
        config,
        opened.table,
        out=folder.path,
        resume=folder.resume,
        meter=opened.meter,
        progress=progress,
        log=log,
        **teacher,
    )
    folder.write_history(result.history)
    if config.finetune_epochs:
        train = opened.images.training(config)
        finetune_snapshots(result, train, config, folder=folder, progress=progress, log=log, **teacher)
    if not parallel.main():
        return {}
    found = {"model": command.model, "criterion": result.criterion, "targets": [p.target for p in result.snapshots]}
    found |= _measure(command, opened, result, folder, dense, progress)
    found |= {"seconds": time.monotonic() - start, "recipe": flat(command)}
    lines = ways_back(
        command.model,
        config,
        None if config.train else count_images(opened.loader, config),
        found,
        opening=command.opening,
        machine=command.machine,
        where=command.where,
        labelled=opened.images.unlabelled is None,
    )
    found["ways_back"] = list(lines)
    if opened.meter:
        found["memory"] = result.memory | {"peak": opened.meter.peak}
    if refits := [row for row in result.history if "refit_seconds" in row]:
        found["refit_seconds"] = sum(row["refit_seconds"] for row in refits)
        found["cost_seconds"] = max(row["cost_seconds"] for row in refits)
        found["chosen_by"] = [row["cost"] for row in refits if "cost" in row]
        found["refit_peak_memory"] = max(row["peak_memory"] for row in refits)
    folder.finish(found)
    return found


def _quality(model: nn.Module, reference: nn.Module, opened: Opened, progress: Progress) -> dict[str, float | None]:
    """What the task goes by, of a model; None where it is not evaluated."""
    task = tasks.of(opened.config.task, model)
    if opened.evaluation is None or not parallel.main():
        return kept(None, task.metric)
    how = {"task": task, "reference": reference, "amp": opened.config.amp, "progress": progress}
    return kept(accuracy(model, opened.evaluation, **how), task.metric)


def _measure(
    command: PruneCommand, opened: Opened, result: PruneResult, folder: RunFolder, dense: dict, progress: Progress
) -> dict[str, Any]:
    """Latency as measured beside latency as predicted, and accuracy, of every snapshot; also kept in it."""
    reference = unmasked_(opened.model) if result.dense is None else result.dense
    mode, dtype = command.latency.deployed(next(reference.parameters()).device)
    images = sample_images(reference, command.latency.latency_batch).to(dtype)
    models = [reference, *(p.model for p in result.snapshots)]
    progress(0, 1, "measuring snapshots")
    times = compare.measured(models, images, command.latency.latency_seconds / 8, mode, command.latency.runtime)
    rows = []
    for pruned, ms in zip(result.snapshots, times[1:], strict=True):
        if opened.table.setting is not None and command.config.measure_seconds:
            pruned.reading = Reading(pruned.predicted_ratio, ms["measured_ratio"], ms["measured_spread"])
        row = pruned.verdict | ms | compare.size(pruned.model)
        row |= _quality(pruned.model, reference, opened, progress)
        pruned.metrics |= row
        path = pruned.save(folder.snapshot(pruned.target))
        named = {"target": pruned.target, "predicted_ratio": pruned.predicted_ratio}
        named |= {key: pruned.metrics[key] for key in MERGED if key in pruned.metrics}
        rows.append(named | row | {"in_words": pruned.in_words(), "path": str(path)})
    dense = dense | {key: times[0][key] for key in ("latency_ms", "images_per_s")}
    return {"dense": dense, "snapshots": rows} | measured_on(command.latency, images.device)


def stages(command: PruneCommand) -> list[Stage]:
    """What a run does, with shares as if a pass over images, an epoch or a decision took some seconds."""
    config, seconds = command.config, command.latency.latency_seconds
    targets = len(command.latency_ms or command.images_per_second or config.latency_target)
    found = [Stage("measuring latency", seconds, seconds)] * (not command.latency.table) + [Stage("evaluate", 5)]
    if config.train:
        found.append(Stage("prune", 60))
    else:
        found += [Stage("statistics", 20)] * config.refit
        costs = [Stage("costs", 60)] * config.measures_costs  # before the first refit alone
        decided = [Stage("refit", 20)] * config.refit
        if config.merges_tokens:
            found += [Stage("what merging takes", seconds / 4, seconds / 4), Stage("merge", 10)]
            decided += [Stage("merge", 10)]
        found += [Stage("score", 20), *costs, *decided, *[Stage("score", 20), *decided] * (targets * config.rounds - 1)]
        found += [*[Stage("exchange", 10)] * targets, *[Stage("measure", 10)] * targets] * config.merges_tokens
    found += [Stage("finetune", 60)] * (targets * bool(config.finetune_epochs))
    return [*found, Stage("measuring snapshots", seconds / 8, seconds / 8), *[Stage("evaluate", 5)] * targets]


def run(command: PruneCommand) -> None:
    if command.dry_run:
        with command.machine.running(), shown(stages(command)) as progress:
            foretold = plan_prune(command, progress)
        print("\n".join(foretold.lines(command.out)))
        return
    with (
        command.machine.running(),
        logs.opened(command.logging.log, Path(command.out) / "log", resume=command.resume) as log,
        shown(stages(command)) as progress,
    ):
        found = run_prune(command, progress, log)
    if found:
        tell(command, found)


def tell(command: PruneCommand, found: dict[str, Any]) -> None:
    """Print what a run found: its own, or what stands in the `result.json` of one that is finished."""
    rows = [{"name": "dense", "predicted_ratio": 1.0, "measured_ratio": 1.0} | found["dense"]]
    rows += [{"name": f"pruned to {s['target']:g}"} | s for s in found["snapshots"]]
    show(f"{found['model']}: {in_words(found)}", rows)
    for s in found["snapshots"]:
        print(f"{s['in_words']}; nvit.load({s['path']!r})")
    if memory := found.get("memory"):
        print(f"memory: peak {show_bytes(memory['peak'])} of {found['recipe']['budget']}; {memory['picked']}")
    if "refit_seconds" in found:
        costs = f"costs measured in {found['cost_seconds']:.0f} s, " if found.get("cost_seconds") else ""
        costs += f"nearest choice by prices {', '.join(by)}, " if (by := found.get("chosen_by")) else ""
        print(f"{costs}refit: {found['refit_seconds']:.0f} s, peak memory {found['refit_peak_memory'] / 1e6:.0f} MB")
    for line in found.get("ways_back", ()):
        print(line)
    print(f"{command.out}/result.json written after {found['seconds']:.0f} s")
    print(f"a page of it: nvit report {shlex.quote(str(command.out))}")
