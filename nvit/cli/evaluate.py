"""`nvit evaluate`: accuracy and throughput."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ..analysis.evaluate import accuracy
from ..config import TaskName, _help
from ..utils.progress import Progress
from ..utils.report import show, write_result
from .command import Command
from .flags import DataFlags, Flat, MachineFlags, ModelFlags
from .inputs import NO_DATA, open_evaluation_data
from .models import open_model
from .progress import shown


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Accuracy (top-1 and top-5, or what else the task has), and images per second."""

    task: TaskName = "auto"
    batch_size: Annotated[int, _help("images a batch")] = 64
    amp: Annotated[Literal["no", "bf16", "fp16"], _help("mixed precision")] = "no"
    compile: Annotated[bool, _help("through torch.compile, once; images/s are those of the compiled model")] = False
    out: Annotated[str, _help("folder for result.json; none if empty")] = ""
    opening: Flat[ModelFlags] = field(default_factory=ModelFlags)
    machine: Flat[MachineFlags] = field(default_factory=MachineFlags)
    images: Flat[DataFlags] = field(default_factory=DataFlags)


def run_evaluate(name: str, command: EvaluateCommand, progress: Progress) -> dict[str, Any]:
    """What goes into result.json."""
    model = open_model(name, command.opening, command.machine.pick())
    evaluation = open_evaluation_data(model, command.images, command.batch_size, command.task)
    if evaluation is None:
        raise ValueError(NO_DATA)
    found = {"model": name} | accuracy(
        model, evaluation, task=command.task, amp=command.amp, compile=command.compile, progress=progress
    )
    if command.out:
        write_result(command.out, found)
    return found


def run(command: EvaluateCommand, words: Sequence[str]) -> None:
    with command.machine.running(), shown() as progress:
        found = run_evaluate(words[0], command, progress)
    show(f"{found['images']} images", [{"name": words[0]} | found])


COMMAND = Command(EvaluateCommand, "MODEL [RECIPE.toml]", run, 1, 1)
