"""`nvit evaluate`: accuracy and throughput."""

from __future__ import annotations

from typing import Any

from .. import tasks
from ..analysis.evaluate import accuracy
from ..utils.progress import Progress
from ..utils.report import show, write_result
from ..utils.stages import Stage
from .flags.evaluate import EvaluateCommand
from .inputs import NO_DATA, open_evaluation_data
from .models import open_model
from .progress import shown
from .towers import evaluate_tower


def run_evaluate(name: str, command: EvaluateCommand, progress: Progress) -> dict[str, Any]:
    """What goes into result.json."""
    model = open_model(name, command.opening, command.machine.pick())
    task = tasks.of(command.task, model).name
    if task == "features":
        found = evaluate_tower(model, command, progress)
    else:
        _refuse_towers_flags(command, task)
        evaluation = open_evaluation_data(model, command.images, command.batch_size, command.task)
        if evaluation is None:
            raise ValueError(NO_DATA)
        found = accuracy(
            model, evaluation, task=command.task, amp=command.amp, compile=command.compile, progress=progress
        )
    found = {"model": name} | found
    if command.out:
        write_result(command.out, found)
    return found


def _refuse_towers_flags(command: EvaluateCommand, task: str) -> None:
    for name, value, default in (("reference", command.reference, ""), ("features", command.features, "auto")):
        if value != default:
            raise ValueError(f"--{name} is for task features, the task is {task}; leave it out")


def run(command: EvaluateCommand) -> None:
    with command.machine.running(), shown([Stage("evaluate", 1)]) as progress:
        found = run_evaluate(command.model, command, progress)
    show(f"{found['images']} images", [{"name": command.model} | found])
