"""`nvit finetune`: train a compact model, or with `--scratch` a new one, and save it as a snapshot."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import torch

from .. import parallel, tasks
from ..about import environment
from ..analysis import compare
from ..analysis.evaluate import accuracy
from ..analysis.share import kept
from ..structure import snapshot
from ..training.finetune import finetune
from ..utils import logs
from ..utils.logs import Log, unlogged
from ..utils.progress import Progress
from ..utils.report import show, write_result
from ..utils.stages import Stage
from .command import flat
from .flags.finetune import FinetuneCommand
from .heads import with_new_head
from .inputs import open_images
from .models import open_cnn_teacher, open_model, open_teacher, untrained
from .progress import say, shown


def run_finetune(name: str, command: FinetuneCommand, progress: Progress, log: Log = unlogged) -> dict[str, Any]:
    """What goes into result.json; of several ranks, each of which trains, rank 0 alone evaluates, writes and has it."""
    start = time.monotonic()
    out, config = Path(command.out), command.config
    refuse_snapshot(out, command.resume)
    torch.manual_seed(config.seed)
    device = command.machine.pick()
    model = open_model(name, command.opening, device, scratch=command.scratch)
    new = untrained(name, command.opening, scratch=command.scratch)
    model, headed = with_new_head(model, config.task, command.images, say, asked=command.new_head)
    witness = "never" if new or headed else "order"
    images = open_images(model, command.images, task=config.task, witness=witness)
    loader = images.training(config)
    evaluation = images.evaluation(config.batch_size, command.images.eval_images)
    teacher = open_teacher(command.teacher, command.teacher_checkpoint, device)
    cnn, renormalise = open_cnn_teacher(config.cnn_teacher, model)

    task = tasks.of(config.task, model)

    def evaluated(name: str = "") -> dict[str, float | None]:
        known = evaluation is not None and parallel.main()
        how = {"task": task, "reference": teacher, "progress": progress}
        return kept(accuracy(model, evaluation, **how) if known else None, task.metric, name)

    # A head that was just drawn knows nothing.
    before = kept(None, task.metric, f"{task.metric}_before") if headed else evaluated(f"{task.metric}_before")
    model = finetune(
        model,
        loader,
        config,
        teacher=teacher,
        cnn_teacher=cnn,
        renormalise=renormalise,
        state_file=command.state_file,
        resume=command.resume,
        progress=progress,
        log=log,
    )
    if not parallel.main():
        return {}
    found = {"model": name, "epochs": config.epochs, "metric": task.metric} | before | evaluated()
    found |= compare.size(model)
    snapshot.save(out, model, found)
    found |= {"path": str(out), "seconds": time.monotonic() - start}
    found |= {"recipe": flat(command), "environment": environment(device)}
    write_result(out, found)
    command.state_file.unlink(missing_ok=True)
    return found


STAGES = (Stage("evaluate", 5), Stage("finetune", 90), Stage("evaluate", 5))


def refuse_snapshot(out: Path, resume: bool = False) -> None:
    """Raise ValueError where a snapshot would be overwritten."""
    if parallel.from_main(lambda: snapshot.is_snapshot(out)) and not resume:
        raise ValueError(f"{out} holds a snapshot already; choose another --out or remove it")


def run(command: FinetuneCommand) -> None:
    with (
        command.machine.running(),
        logs.opened(command.logging.log, command.logging.beside(command.out), resume=command.resume) as log,
        shown(STAGES) as progress,
    ):
        found = run_finetune(command.model, command, progress, log)
    if found:
        tell(command, found)


def tell(command: FinetuneCommand, found: dict[str, Any]) -> None:
    """Print what a run found: its own, or what stands in the `result.json` of one that is finished."""
    metric = found["metric"]
    before = {"name": "before", metric: found[f"{metric}_before"], f"{metric}_se": found.get(f"{metric}_before_se")}
    show(f"{command.model}: {found['epochs']:g} epochs", [before, {"name": "after"} | found])
    print(f"{found['path']}: nvit.load({found['path']!r})")
    print(f"a page of it: nvit report {shlex.quote(str(command.out))}")
