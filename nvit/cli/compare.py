"""`nvit compare`: several models in one run, latency measured in turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import adapters
from ..analysis.compare import side_by_side, smallest_bundles
from ..analysis.evaluate import accuracy, peak_memory
from ..latency.clock import in_dtype
from ..latency.measure import sample_images
from ..utils.progress import Progress
from ..utils.report import show, write_csv, write_result
from ..utils.stages import Stage
from .flags.compare import CompareCommand
from .inputs import open_evaluation_data
from .models import open_models
from .progress import shown
from .tables import in_words, measured_on, open_table

NOT_COMPARED = {"loss", "images", "images_per_s"}
"""Of what an evaluation says: the loss, what is the same for all, and a speed that is measured better elsewhere."""


def run_compare(names: Sequence[str], command: CompareCommand, progress: Progress) -> dict[str, Any]:
    """What goes into result.json.

    Raises:
        ValueError: the models take images of different sizes.
    """
    device = command.machine.pick()
    models = open_models(names, command.opening, device)
    sizes = {tuple(adapters.preprocess(m)["input_size"]) for m in models}
    if len(sizes) > 1:
        raise ValueError(f"the models take images of different sizes {sorted(sizes)}; compare ones that take the same")
    table = open_table(models[0], command.latency, smallest_bundles(models), progress)
    mode, dtype = command.latency.deployed(device)
    images = sample_images(models[0], command.latency.latency_batch).to(dtype)
    progress(0, 1, "measuring models")
    found = side_by_side(models, table, images, command.seconds, mode, command.latency.runtime)
    rows = []
    for name, model, row in zip(names, models, found, strict=True):
        row = {"name": name} | row | {"peak_memory": peak_memory(in_dtype(model.eval(), dtype), images)}
        evaluation = open_evaluation_data(model, command.images, command.batch_size, command.task)
        if evaluation is not None:
            how = {"task": command.task, "reference": models[0], "progress": progress}
            row |= {key: value for key, value in accuracy(model, evaluation, **how).items() if key not in NOT_COMPARED}
        rows.append(row)
    result = {"models": rows} | measured_on(command.latency, images.device)
    if command.out:
        write_result(command.out, result)
        write_csv(Path(command.out) / "compare.csv", rows)
    return result


def stages(command: CompareCommand) -> list[Stage]:
    """What a comparison does, in seconds, an evaluation taken for ten."""
    table, seconds = command.latency.latency_seconds, command.seconds
    found = [Stage("measuring latency", table, table)] * (not command.latency.table)
    return [*found, Stage("measuring models", seconds, seconds), *[Stage("evaluate", 10)] * len(command.models)]


def run(command: CompareCommand) -> None:
    with command.machine.running(), shown(stages(command)) as progress:
        found = run_compare(command.models, command, progress)
    show(in_words(found), found["models"])
