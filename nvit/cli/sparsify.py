"""`nvit sparsify`: 2:4 on the projections, sparse only where a GPU was measured faster; saved as a snapshot."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import sparse24, tasks
from ..analysis.evaluate import accuracy
from ..analysis.share import kept
from ..config import TrainingConfig
from ..latency.measure import sample_images
from ..structure import snapshot
from ..training.data import TrainingData
from ..training.distill import frozen
from ..training.finetune import finetune
from ..training.images import DigitImages, Images
from ..training.targets import TargetImages
from ..utils import logs
from ..utils.logs import Log, unlogged
from ..utils.progress import Progress
from ..utils.report import show, write_csv, write_result
from ..utils.stages import Stage
from .advice import fall
from .finetune import refuse_snapshot
from .flags.sparsify import SparsifyCommand
from .inputs import NO_DATA, has_images, open_images
from .models import open_model, open_teacher
from .progress import shown

PROJECTIONS = "projections.csv"
"""The file with a row per projection."""

CALIBRATION_BATCH = 32


@dataclass(frozen=True)
class _Opened:
    """A command's model, and its images where it has any."""

    model: nn.Module
    images: Images | TargetImages | DigitImages | None
    evaluation: DataLoader | None
    training: TrainingData | None


def _open(name: str, command: SparsifyCommand) -> _Opened:
    config, where = command.config, command.where
    model = open_model(name, command.opening, command.machine.pick())
    learns = bool(config.epochs) or command.choice == "curvature"
    if not learns and not has_images(model, where):
        return _Opened(model, None, None, None)
    images = open_images(model, where, task=config.task)
    if learns and not isinstance(images, DigitImages) and not where.data:
        raise ValueError(NO_DATA)
    evaluation = images.evaluation(config.batch_size, where.eval_images, own=not learns)
    return _Opened(model, images, evaluation, images.training(config) if config.epochs else None)


def calibration(images: Images | TargetImages | DigitImages, count: int, seed: int) -> Iterator[Tensor]:
    """So many images, or all there are, in batches: the first of the shuffled training data, without augmentation.

    Raises:
        ValueError: none are asked for.
    """
    if count < 1:
        raise ValueError(f"--images {count}: --choice curvature needs calibration images, hundreds of them")
    for batch, _ in images.training(TrainingConfig(batch_size=CALIBRATION_BATCH, seed=seed), augment=False):
        yield batch[:count]
        count -= len(batch)
        if count <= 0:
            return


def _choose_(
    opened: _Opened, command: SparsifyCommand, names: Collection[str], progress: Progress
) -> dict[str, Tensor]:
    """Make these projections 2:4, in place; the masks."""
    model = opened.model
    if command.choice == "curvature":
        batches = calibration(opened.images, command.images, command.config.seed)
        return sparse24.choose_by_curvature_(
            model,
            batches,
            names,
            damping=command.damping,
            task=tasks.of(command.config.task, model),
            progress=progress,
        )
    masks = {n: m for n, m in sparse24.masks_2to4(model).items() if n in names}
    sparse24.apply_masks_(model, masks)
    return masks


def run_sparsify(name: str, command: SparsifyCommand, progress: Progress, log: Log = unlogged) -> dict[str, Any]:
    """What goes into result.json."""
    start = time.monotonic()
    out, config = Path(command.out), command.config
    refuse_snapshot(out)
    opened = _open(name, command)
    model = opened.model

    task = tasks.of(config.task, model)
    reference = None if task.reads_labels else copy.deepcopy(model)

    def evaluated(name: str) -> dict[str, float | None]:
        how = {"task": task, "reference": reference, "progress": progress}
        data = opened.evaluation
        return kept(None if data is None else accuracy(model, data, **how), task.metric, name)

    metric = task.metric
    found: dict[str, Any] = {"model": name, "choice": command.choice, "metric": metric} | evaluated(f"{metric}_dense")
    teacher = None
    if config.epochs and config.distill_weight:
        teacher = open_teacher(command.teacher, command.teacher_checkpoint, command.machine.pick())
        teacher = frozen(copy.deepcopy(model)) if teacher is None else teacher
    found["permuted"] = sparse24.permute_(model, command.permute_seconds, progress) if command.permute else []
    images = sample_images(model, command.latency_batch)
    layers = sparse24.measure(model, images, getattr(torch, command.dtype), progress)
    before = _magnitudes(model)
    masks = _choose_(opened, command, [n for n, choice in layers.items() if choice.masked], progress)
    model.sparse24 = tuple(masks)
    sparse = evaluated(f"{metric}_sparse")
    found |= sparse
    if config.epochs:
        constrain = partial(sparse24.apply_masks_, model, masks)
        how = {"teacher": teacher, "constrain": constrain, "progress": progress, "log": log}
        model = finetune(model, opened.training, config, **how)
    unchanged = {name.replace("_sparse", ""): value for name, value in sparse.items()}
    found |= evaluated(metric) if config.epochs else unchanged
    found["layers"] = _layers(model, layers, before)
    found["sparse_layers"] = len(masks)
    snapshot.save(out, model, {k: v for k, v in found.items() if k != "layers"})
    write_csv(out / PROJECTIONS, found["layers"])
    found |= {"path": str(out), "seconds": time.monotonic() - start}
    write_result(out, found)
    return found


def _magnitudes(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.weight.detach().abs().sum() for n, p in sparse24.projections(model).items()}


def _layers(
    model: nn.Module, choices: Mapping[str, sparse24.Choice], before: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """A row per projection: what was chosen for it, its shape, and its magnitude as a part of what it was."""
    now = _magnitudes(model)
    return [
        dataclasses.asdict(choices[n]) | {"shape": list(p.weight.shape), "kept": float(now[n] / before[n])}
        for n, p in sparse24.projections(model).items()
    ]


def summary(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each kind of projection and what was chosen for it, in order of appearance."""
    alike: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for layer in layers:
        kind = layer["weight"].removesuffix(".weight").rpartition(".")[2]
        alike.setdefault((kind, layer["backend"], layer["why"]), []).append(layer)
    lines = []
    for (kind, backend, why), rows in alike.items():
        magnitude = sum(row["kept"] for row in rows) / len(rows)
        times = ""
        if all(row["dense_ms"] is not None and row["sparse_ms"] is not None for row in rows):
            dense, sparse = (sum(row[key] for row in rows) for key in ("dense_ms", "sparse_ms"))
            times = f"; together dense {dense:.3f} ms, sparse {sparse:.3f} ms"
        lines.append(f"{len(rows)} × {kind}: {backend} ({why}), {magnitude:.3f} of its magnitude{times}")
    return lines


def way_out(found: Mapping[str, Any]) -> str | None:
    """What to do about a loss of more than `advice.LOSS` points; None where it is less or unknown, or no top-1."""
    if found["metric"] != "top1" or (lost := fall(found["top1_dense"], found["top1"])) is None:
        return None
    ways = [] if found["choice"] == "curvature" else ["--choice curvature (calibration images, no training)"]
    ways.append("--epochs 5 (training under the masks, the dense model as teacher)")
    return (
        f"top-1 fell by {lost:.1f} points. Run `nvit sparsify {found['model']}` again, into another --out, with "
        + " or ".join(ways)
    )


def stages(command: SparsifyCommand) -> list[Stage]:
    """What sparsifying does."""
    found = [Stage("evaluate", 5), *[Stage("permute", 20)] * command.permute, Stage("measure", 20)]
    found += [Stage("2:4 by curvature", 30)] * (command.choice == "curvature") + [Stage("evaluate", 5)]
    return found + [Stage("finetune", 60), Stage("evaluate", 5)] * bool(command.config.epochs)


def run(command: SparsifyCommand) -> None:
    with (
        command.machine.running(),
        logs.opened(command.logging.log, command.logging.beside(command.out)) as log,
        shown(stages(command)) as progress,
    ):
        found = run_sparsify(command.model, command, progress, log)
    metric = found["metric"]
    steps = {"dense": f"{metric}_dense", f"2:4 by {found['choice']}": f"{metric}_sparse"}
    if command.config.epochs:
        steps[f"2:4 finetuned {command.config.epochs:g} epochs"] = metric
    rows = [{"name": name, metric: found[key], f"{metric}_se": found.get(f"{key}_se")} for name, key in steps.items()]
    show(f"{command.model}: {found['sparse_layers']} of {len(found['layers'])} projections are 2:4", rows)
    for line in summary(found["layers"]):
        print(f"  {line}")
    if (line := way_out(found)) is not None:
        print(line)
    print(f"{Path(found['path']) / PROJECTIONS}: a row per projection")
    print(f"{found['path']}: nvit.load({found['path']!r})")
