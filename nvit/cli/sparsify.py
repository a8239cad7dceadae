"""`nvit sparsify`: 2:4 on the projections, sparse only where a GPU was measured faster; saved as a snapshot."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from .. import sparse24
from ..analysis.evaluate import accuracy
from ..config import FinetuneConfig, _help
from ..structure import snapshot
from ..training.distill import frozen
from ..training.finetune import finetune
from ..utils.progress import Progress
from ..utils.report import show, write_result
from .command import Command
from .finetune import refuse_snapshot
from .flags import DataFlags, Flat, MachineFlags, ModelFlags
from .inputs import has_images, open_images, sample_images
from .models import open_model, open_teacher
from .progress import shown


@dataclass(frozen=True, kw_only=True)
class MaskedFinetuning(FinetuneConfig):
    """Finetuning that is left out unless asked for."""

    epochs: Annotated[float, _help("of finetuning under the fixed masks; 0 for none")] = 0.0


@dataclass(frozen=True, kw_only=True)
class SparsifyCommand:
    """2:4 sparsity of the blocks' projections: masks, channel order, masked finetuning, speed and accuracy."""

    permute: Annotated[bool, _help("reorder hidden units and V dims first, so that 2:4 keeps more")] = True
    permute_seconds: Annotated[float, _help("bound on the search for an order, all layers together")] = 60.0
    dtype: Annotated[Literal["float16", "bfloat16"], _help("of weights on sparse tensor cores")] = "float16"
    latency_batch: Annotated[int, _help("images a batch while speed is measured")] = 64
    teacher: Annotated[str, _help("the model for L_full, as in finetune; the dense snapshot itself if empty")] = ""
    teacher_checkpoint: Annotated[str, _help("its weights")] = ""
    out: Annotated[str, _help("folder for the sparse snapshot and result.json")] = "nvit-sparse"
    opening: Flat[ModelFlags] = field(default_factory=ModelFlags)
    machine: Flat[MachineFlags] = field(default_factory=MachineFlags)
    images: Flat[DataFlags] = field(default_factory=DataFlags)
    config: Flat[MaskedFinetuning] = field(default_factory=MaskedFinetuning)


def run_sparsify(name: str, command: SparsifyCommand, progress: Progress) -> dict[str, Any]:
    """What goes into result.json."""
    start = time.monotonic()
    out, config, device = Path(command.out), command.config, command.machine.pick()
    refuse_snapshot(out)
    model = open_model(name, command.opening, device)
    evaluation = loader = None
    if config.epochs or has_images(model, command.images):
        images = open_images(model, command.images)
        evaluation = images.evaluation(config.batch_size, command.images.eval_images, own=not config.epochs)
        loader = images.training(config) if config.epochs else None

    def top1() -> float | None:
        return None if evaluation is None else accuracy(model, evaluation, progress=progress)["top1"]

    found: dict[str, Any] = {"model": name, "top1_dense": top1()}
    teacher = None
    if config.epochs and config.distill_weight:
        teacher = open_teacher(command.teacher, command.teacher_checkpoint, device)
        teacher = frozen(copy.deepcopy(model)) if teacher is None else teacher
    found["permuted"] = sparse24.permute_(model, command.permute_seconds, progress) if command.permute else []
    images = sample_images(model, command.latency_batch)
    layers = sparse24.measure(model, images, getattr(torch, command.dtype), progress)
    before = _magnitudes(model)
    masks = {n: m for n, m in sparse24.masks_2to4(model).items() if layers[n].masked}
    sparse24.apply_masks_(model, masks)
    model.sparse24 = tuple(masks)
    found |= {"top1_sparse": top1(), "top1": None}
    if config.epochs:
        constrain = partial(sparse24.apply_masks_, model, masks)
        model = finetune(model, loader, config, teacher=teacher, constrain=constrain, progress=progress)
    found["top1"] = top1() if config.epochs else found["top1_sparse"]
    found["layers"] = _layers(model, layers, before)
    found["sparse_layers"] = len(masks)
    snapshot.save(out, model, {k: v for k, v in found.items() if k != "layers"})
    found |= {"path": str(out), "seconds": time.monotonic() - start}
    write_result(out, found)
    return found


def _magnitudes(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.weight.detach().abs().sum() for n, p in sparse24.projections(model).items()}


def _layers(
    model: nn.Module, choices: Mapping[str, sparse24.Choice], before: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """A row per projection: what was chosen for it, its shape, and the part of its magnitude that it keeps."""
    now = _magnitudes(model)
    return [
        dataclasses.asdict(choices[n]) | {"shape": list(p.weight.shape), "kept": float(now[n] / before[n])}
        for n, p in sparse24.projections(model).items()
    ]


def run(command: SparsifyCommand, words: Sequence[str]) -> None:
    with command.machine.running(), shown() as progress:
        found = run_sparsify(words[0], command, progress)
    rows = [{"name": "dense", "top1": found["top1_dense"]}, {"name": "2:4", "top1": found["top1_sparse"]}]
    if command.config.epochs:
        rows.append({"name": f"2:4 finetuned {command.config.epochs:g} epochs", "top1": found["top1"]})
    show(f"{words[0]}: {found['sparse_layers']} of {len(found['layers'])} projections are 2:4", rows)
    for layer in found["layers"]:
        ms = (layer["dense_ms"], layer["sparse_ms"])
        times = "" if None in ms else ": dense {:.3f} ms, sparse {:.3f} ms".format(*ms)
        kept = f"keeps {layer['kept']:.3f} of its magnitude"
        print(f"  {layer['weight']} {kept}; {layer['backend']}, {layer['why']}{times}")
    print(f"{found['path']}: nvit.load({found['path']!r})")


COMMAND = Command(SparsifyCommand, "SNAPSHOT [RECIPE.toml]", run, 1, 1)
