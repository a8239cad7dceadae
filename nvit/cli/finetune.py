"""`nvit finetune`: train a compact model, or with `--scratch` a new one, and save it as a snapshot."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from .. import parallel
from ..analysis import compare
from ..analysis.evaluate import accuracy
from ..analysis.share import top1
from ..config import FinetuneConfig, _help
from ..structure import snapshot
from ..training.finetune import finetune
from ..utils.progress import Progress
from ..utils.report import show, write_result
from .command import Command
from .flags import DataFlags, Flat, MachineFlags, ModelFlags
from .inputs import open_images
from .models import open_cnn_teacher, open_model, open_teacher, untrained
from .progress import shown


@dataclass(frozen=True, kw_only=True)
class FinetuneCommand:
    """Finetune a compact model; with --scratch, train a new one."""

    out: Annotated[str, _help("folder for the snapshot and result.json")] = "nvit-finetuned"
    teacher: Annotated[str, _help("the unpruned model for L_full, named as MODEL is; none if empty")] = ""
    teacher_checkpoint: Annotated[str, _help("its weights")] = ""
    scratch: Annotated[bool, _help("start from random weights")] = False
    resume: Annotated[bool, _help("go on where an interrupted run in --out stopped")] = False
    opening: Flat[ModelFlags] = field(default_factory=ModelFlags)
    machine: Flat[MachineFlags] = field(default_factory=MachineFlags)
    images: Flat[DataFlags] = field(default_factory=DataFlags)
    config: Flat[FinetuneConfig] = field(default_factory=FinetuneConfig)


def run_finetune(name: str, command: FinetuneCommand, progress: Progress) -> dict[str, Any]:
    """What goes into result.json; of several ranks, each of which trains, rank 0 alone evaluates, writes and has it."""
    start = time.monotonic()
    out, config = Path(command.out), command.config
    refuse_snapshot(out, command.resume)
    torch.manual_seed(config.seed)
    device = command.machine.pick()
    model = open_model(name, command.opening, device, scratch=command.scratch)
    new = untrained(name, command.opening, scratch=command.scratch)
    images = open_images(model, command.images, witness="never" if new else "order")
    loader = images.training(config)
    evaluation = images.evaluation(config.batch_size, command.images.eval_images)
    teacher = open_teacher(command.teacher, command.teacher_checkpoint, device)
    cnn, renormalise = open_cnn_teacher(config.cnn_teacher, model)

    def evaluated(name: str) -> dict[str, float | None]:
        known = evaluation is not None and parallel.main()
        return top1(accuracy(model, evaluation, progress=progress) if known else None, name)

    before = evaluated("top1_before")
    state_file = out.with_name(f"{out.name}_state.safetensors")  # beside the snapshot, which appears whole
    model = finetune(
        model,
        loader,
        config,
        teacher=teacher,
        cnn_teacher=cnn,
        renormalise=renormalise,
        state_file=state_file,
        resume=command.resume,
        progress=progress,
    )
    if not parallel.main():
        return {}
    found = {"model": name, "epochs": config.epochs} | before | evaluated("top1") | compare.size(model)
    snapshot.save(out, model, found)
    found |= {"path": str(out), "seconds": time.monotonic() - start}
    write_result(out, found)
    state_file.unlink(missing_ok=True)
    return found


def refuse_snapshot(out: Path, resume: bool = False) -> None:
    """Raise ValueError where a snapshot would be overwritten."""
    if parallel.from_main(lambda: snapshot.is_snapshot(out)) and not resume:
        raise ValueError(f"{out} holds a snapshot already; choose another --out or remove it")


def run(command: FinetuneCommand, words: Sequence[str]) -> None:
    with command.machine.running(), shown() as progress:
        found = run_finetune(words[0], command, progress)
    if not found:
        return
    before = {"name": "before", "top1": found["top1_before"], "top1_se": found["top1_before_se"]}
    show(f"{words[0]}: {found['epochs']:g} epochs", [before, {"name": "after"} | found])
    print(f"{found['path']}: nvit.load({found['path']!r})")


COMMAND = Command(FinetuneCommand, "MODEL [RECIPE.toml]", run, 1, 1, ranks=True)
