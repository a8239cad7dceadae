"""`nvit analyze latency`: predicted against measured latency over random widths."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from ..analysis import prediction
from ..latency.measure import sample_images
from ..spec import BUNDLE_SIZES
from ..utils.progress import Progress
from ..utils.report import write_csv, write_result
from ..utils.stages import Stage
from .flags.prediction import PredictionCommand
from .models import is_snapshot, open_model
from .progress import shown
from .tables import in_words, measured_on, open_table


def run_prediction(name: str, command: PredictionCommand, progress: Progress) -> dict[str, Any]:
    """What goes into result.json."""
    start, device = time.monotonic(), command.machine.pick()
    # Latency does not depend on the weights: none are fetched. A snapshot has its own.
    opening = command.opening if is_snapshot(name) else dataclasses.replace(command.opening, pretrained=False)
    model = open_model(name, opening, device)
    table = open_table(model, command.latency, BUNDLE_SIZES, progress)
    mode, dtype = command.latency.deployed(device)
    rows = prediction.predicted_and_measured(
        model,
        table,
        sample_images(model, command.latency.latency_batch).to(dtype),
        count=command.count,
        seconds=command.seconds,
        mode=mode,
        runtime=command.latency.runtime,
        seed=command.seed,
        progress=progress,
    )
    out = Path(command.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "latency.csv", rows)
    prediction.plot(rows, out / "latency.png")
    result = {"model": name, "models": command.count, "error_percent": prediction.errors(rows)}
    result |= {"csv": str(out / "latency.csv"), "figure": str(out / "latency.png")}
    result |= {"seconds": time.monotonic() - start} | measured_on(command.latency, device)
    write_result(out, result)
    return result


def run(command: PredictionCommand) -> None:
    table = command.latency
    stages = [Stage("measuring latency", table.latency_seconds, table.latency_seconds)] * (not table.table)
    stages += [Stage("measuring models", command.seconds, command.seconds)]
    with command.machine.running(), shown(stages) as progress:
        found = run_prediction(command.model, command, progress)
    off = found["error_percent"]
    print(in_words(found))
    print(
        f"{command.model}: {found['models']} models of random widths; the table is off by {off['median']:.1f} % "
        f"(median), {off['p90']:.1f} % (nine of ten below), {off['largest']:.1f} % at most; {off['mean']:+.1f} % on "
        "the mean"
    )
    print(f"{found['csv']}\n{found['figure']}")
