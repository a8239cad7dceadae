"""`nvit sparsify`: 2:4 on the projections, sparse only where a GPU was measured faster; saved as a snapshot."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import sparse24
from ..analysis.evaluate import accuracy
from ..analysis.share import top1
from ..config import FinetuneConfig, TrainingConfig, _help
from ..latency.measure import sample_images
from ..structure import snapshot
from ..training.data import TrainingData
from ..training.distill import frozen
from ..training.finetune import finetune
from ..training.images import DigitImages, Images
from ..utils.progress import Progress
from ..utils.report import show, write_csv, write_result
from .advice import fall
from .command import Command
from .finetune import refuse_snapshot
from .flags import DataFlags, Flat, MachineFlags, ModelFlags
from .inputs import NO_DATA, has_images, open_images
from .models import open_model, open_teacher
from .progress import shown

PROJECTIONS = "projections.csv"
"""The file with a row per projection."""

CALIBRATION_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class MaskedFinetuning(FinetuneConfig):
    """Finetuning that is left out unless asked for."""

    epochs: Annotated[float, _help("of finetuning under the fixed masks; 0 for none")] = 0.0


@dataclass(frozen=True, kw_only=True)
class SparsifyCommand:
    """2:4 sparsity of the blocks' projections: masks, channel order, masked finetuning, speed and accuracy."""

    choice: Annotated[
        Literal["magnitude", "curvature"],
        _help(
            "which two of four stay: the largest, or by the loss of outputs on calibration images, changing what stays"
        ),
    ] = "magnitude"
    images: Annotated[int, _help("calibration images of --data, spread over it, for --choice curvature; no labels")] = (
        512
    )
    damping: Annotated[float, _help("of the inputs' covariance, a share of its mean, for --choice curvature")] = (
        sparse24.DAMPING
    )
    permute: Annotated[bool, _help("reorder hidden units and V dims first, so that 2:4 keeps more")] = True
    permute_seconds: Annotated[float, _help("bound on the search for an order, all layers together")] = 60.0
    dtype: Annotated[Literal["float16", "bfloat16"], _help("of weights on sparse tensor cores")] = "float16"
    latency_batch: Annotated[int, _help("images a batch while speed is measured")] = 64
    teacher: Annotated[str, _help("the model for L_full, as in finetune; the dense snapshot itself if empty")] = ""
    teacher_checkpoint: Annotated[str, _help("its weights")] = ""
    out: Annotated[str, _help("folder for the sparse snapshot, result.json and projections.csv")] = "nvit-sparse"
    opening: Flat[ModelFlags] = field(default_factory=ModelFlags)
    machine: Flat[MachineFlags] = field(default_factory=MachineFlags)
    where: Flat[DataFlags] = field(default_factory=DataFlags)
    config: Flat[MaskedFinetuning] = field(default_factory=MaskedFinetuning)


@dataclass(frozen=True)
class _Opened:
    """A command's model, and its images where it has any."""

    model: nn.Module
    images: Images | DigitImages | None
    evaluation: DataLoader | None
    training: TrainingData | None


def _open(name: str, command: SparsifyCommand) -> _Opened:
    config, where = command.config, command.where
    model = open_model(name, command.opening, command.machine.pick())
    learns = bool(config.epochs) or command.choice == "curvature"
    if not learns and not has_images(model, where):
        return _Opened(model, None, None, None)
    images = open_images(model, where)
    if learns and isinstance(images, Images) and not where.data:
        raise ValueError(NO_DATA)
    evaluation = images.evaluation(config.batch_size, where.eval_images, own=not learns)
    return _Opened(model, images, evaluation, images.training(config) if config.epochs else None)


def calibration(images: Images | DigitImages, count: int, seed: int) -> Iterator[Tensor]:
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
        return sparse24.choose_by_curvature_(model, batches, names, damping=command.damping, progress=progress)
    masks = {n: m for n, m in sparse24.masks_2to4(model).items() if n in names}
    sparse24.apply_masks_(model, masks)
    return masks


def run_sparsify(name: str, command: SparsifyCommand, progress: Progress) -> dict[str, Any]:
    """What goes into result.json."""
    start = time.monotonic()
    out, config = Path(command.out), command.config
    refuse_snapshot(out)
    opened = _open(name, command)
    model = opened.model

    def evaluated(stage: str) -> dict[str, float | None]:
        data = opened.evaluation
        return top1(None if data is None else accuracy(model, data, progress=progress), stage)

    found: dict[str, Any] = {"model": name, "choice": command.choice} | evaluated("top1_dense")
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
    found |= evaluated("top1_sparse")
    if config.epochs:
        constrain = partial(sparse24.apply_masks_, model, masks)
        model = finetune(model, opened.training, config, teacher=teacher, constrain=constrain, progress=progress)
    now = {"top1": found["top1_sparse"], "top1_se": found["top1_sparse_se"]}
    found |= evaluated("top1") if config.epochs else now
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
        kept = sum(row["kept"] for row in rows) / len(rows)
        times = ""
        if all(row["dense_ms"] is not None and row["sparse_ms"] is not None for row in rows):
            dense, sparse = (sum(row[key] for row in rows) for key in ("dense_ms", "sparse_ms"))
            times = f"; together dense {dense:.3f} ms, sparse {sparse:.3f} ms"
        lines.append(f"{len(rows)} × {kind}: {backend} ({why}), {kept:.3f} of its magnitude{times}")
    return lines


def way_out(found: Mapping[str, Any], words: Sequence[str]) -> str | None:
    """What to do about a loss of more than `advice.LOSS` points; None where it is less or unknown."""
    if (lost := fall(found["top1_dense"], found["top1"])) is None:
        return None
    ways = [] if found["choice"] == "curvature" else ["--choice curvature (calibration images, no training)"]
    ways.append("--epochs 5 (training under the masks, the dense model as teacher)")
    return (
        f"top-1 fell by {lost:.1f} points. Run `nvit sparsify {words[0]}` again, into another --out, with "
        + " or ".join(ways)
    )


def run(command: SparsifyCommand, words: Sequence[str]) -> None:
    with command.machine.running(), shown() as progress:
        found = run_sparsify(words[0], command, progress)
    stages = {"dense": "top1_dense", f"2:4 by {found['choice']}": "top1_sparse"}
    if command.config.epochs:
        stages[f"2:4 finetuned {command.config.epochs:g} epochs"] = "top1"
    rows = [{"name": name, "top1": found[key], "top1_se": found[f"{key}_se"]} for name, key in stages.items()]
    show(f"{words[0]}: {found['sparse_layers']} of {len(found['layers'])} projections are 2:4", rows)
    for line in summary(found["layers"]):
        print(f"  {line}")
    if (line := way_out(found, words)) is not None:
        print(line)
    print(f"{Path(found['path']) / PROJECTIONS}: a row per projection")
    print(f"{found['path']}: nvit.load({found['path']!r})")


COMMAND = Command(SparsifyCommand, "SNAPSHOT [RECIPE.toml]", run, 1, 1)
