"""`nvit compare`: several models in one run, latency measured in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from .. import adapters
from ..analysis.compare import side_by_side, smallest_bundles
from ..analysis.evaluate import accuracy, peak_memory
from ..analysis.share import top1
from ..config import _help
from ..latency.clock import in_dtype
from ..latency.measure import sample_images
from ..utils.progress import Progress
from ..utils.report import show, write_csv, write_result
from .command import Command
from .flags import DataFlags, Flat, LatencyFlags, MachineFlags, ModelFlags
from .inputs import open_evaluation_data
from .models import open_model
from .progress import shown
from .tables import in_words, measured_on, open_table


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Parameters, MACs, latency, memory and accuracy of several models, side by side; the first is the reference."""

    batch_size: Annotated[int, _help("images a batch while evaluating")] = 64
    seconds: Annotated[float, _help("time for measuring latency, all models in turn")] = 20.0
    out: Annotated[str, _help("folder for result.json and compare.csv; none if empty")] = ""
    opening: Flat[ModelFlags] = field(default_factory=ModelFlags)
    machine: Flat[MachineFlags] = field(default_factory=MachineFlags)
    images: Flat[DataFlags] = field(default_factory=DataFlags)
    latency: Flat[LatencyFlags] = field(default_factory=LatencyFlags)


def run_compare(names: Sequence[str], command: CompareCommand, progress: Progress) -> dict[str, Any]:
    """What goes into result.json.

    Raises:
        ValueError: the models take images of different sizes.
    """
    device = command.machine.pick()
    models = [open_model(name, command.opening, device) for name in names]
    sizes = {tuple(adapters.preprocess(m)["input_size"]) for m in models}
    if len(sizes) > 1:
        raise ValueError(f"the models take images of different sizes {sorted(sizes)}; compare ones that take the same")
    table = open_table(models[0], command.latency, smallest_bundles(models), progress)
    mode, dtype = command.latency.deployed(device)
    images = sample_images(models[0], command.latency.latency_batch).to(dtype)
    found = side_by_side(models, table, images, command.seconds, mode)
    rows = []
    for name, model, row in zip(names, models, found, strict=True):
        row = {"name": name} | row | {"peak_memory": peak_memory(in_dtype(model.eval(), dtype), images)}
        evaluation = open_evaluation_data(model, command.images, command.batch_size)
        if evaluation is not None:
            top = accuracy(model, evaluation, progress=progress)
            row |= top1(top) | {"top5": top["top5"]}
        rows.append(row)
    result = {"models": rows} | measured_on(command.latency, images.device)
    if command.out:
        write_result(command.out, result)
        write_csv(Path(command.out) / "compare.csv", rows)
    return result


def run(command: CompareCommand, words: Sequence[str]) -> None:
    with command.machine.running(), shown() as progress:
        found = run_compare(words, command, progress)
    show(in_words(found), found["models"])


COMMAND = Command(CompareCommand, "MODEL MODEL … [RECIPE.toml]", run, 1, None)
