"""`nvit analyze sensitivity`: the paper's Tab. 5 for any model."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from .. import adapters
from ..analysis import sensitivity
from ..spec import BUNDLE_SIZES
from ..utils.progress import Progress
from ..utils.report import show, write_csv, write_result
from ..utils.stages import Stage
from .flags.sensitivity import SensitivityCommand
from .inputs import open_images
from .models import open_model, untrained
from .progress import shown
from .tables import measured_on, open_table


def run_sensitivity(name: str, command: SensitivityCommand, progress: Progress) -> dict[str, Any]:
    """What goes into result.json."""
    start, device = time.monotonic(), command.machine.pick()
    model, config = open_model(name, command.opening, device), command.reading()
    witness = "never" if untrained(name, command.opening) else "always"
    loader = open_images(model, command.images, task=config.task, witness=witness).training(config, augment=False)
    table = open_table(model, command.latency, BUNDLE_SIZES, progress)
    structures = sensitivity.weights_of(model, adapters.find(model).groups(model))
    count = min(command.samples // command.batch_size, len(loader))
    found = sensitivity.traces(
        model,
        structures,
        itertools.islice(loader, count),
        probes=command.probes,
        seed=command.seed,
        task=config.task,
        total=count,
        progress=progress,
    )
    slopes, rows = table.slopes(), sensitivity.rows_of(structures, found)
    for row in rows:
        row["latency_per_unit"] = slopes[f"ms_per_{sensitivity.STRUCTURES[row['structure']]}"] / table.dense_ms
    out, images = Path(command.out), count * command.batch_size
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "sensitivity.csv", rows)
    sensitivity.plot(rows, out / "sensitivity.png", images)
    latency = {"table": "analytic"} if table.setting is None else measured_on(command.latency, device)
    result = {
        "model": name,
        "structures": [r for r in rows if r["block"] == "all"],
        "images": images,
        "probes": command.probes,
        "latency": latency,
        "csv": str(out / "sensitivity.csv"),
        "figure": str(out / "sensitivity.png"),
        "seconds": time.monotonic() - start,
    }
    write_result(out, result)
    return result


def run(command: SensitivityCommand) -> None:
    with command.machine.running(), shown([Stage("sensitivity", 100)]) as progress:
        found = run_sensitivity(command.model, command, progress)
    rows = [{"name": r["structure"]} | r for r in found["structures"]]
    counted = " counted" if found["latency"] == {"table": "analytic"} else ""
    title = (
        f"{command.model}: mean trace a weight ± its standard error, {found['images']} images, {found['probes']} probes"
    )
    show(f"{title};{counted} latency of a unit as a share of the dense model's", rows, head="structure")
    print(f"{found['csv']}\n{found['figure']}")
