"""`nvit analyze attention`: the paper's appendix C.1 for any models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..analysis import diversity
from ..utils.progress import Progress
from ..utils.report import show, write_csv, write_result
from ..utils.stages import Stage
from .flags.attention import AttentionCommand
from .inputs import NO_DATA, open_evaluation_data
from .models import open_models
from .progress import shown


def run_attention(names: Sequence[str], command: AttentionCommand, progress: Progress) -> dict[str, Any]:
    """What goes into result.json.

    Raises:
        ValueError: no images are named.
    """
    start, device = time.monotonic(), command.machine.pick()
    flags, models, images = replace(command.images, eval_images=command.samples), {}, 0
    for name, model in zip(names, open_models(names, command.opening, device), strict=True):
        loader = open_evaluation_data(model, flags, command.batch_size, command.task)
        if loader is None:
            raise ValueError(NO_DATA)
        images = len(loader.dataset)
        models[name] = diversity.head_diversity(model, (x for x, _ in loader), total=len(loader), progress=progress)
    rows = [{"model": name} | row for name, mine in models.items() for row in mine]
    out = Path(command.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "attention.csv", rows)
    diversity.plot(models, out / "attention.png", images)
    result = {
        "attention": rows,
        "images": images,
        "csv": str(out / "attention.csv"),
        "figure": str(out / "attention.png"),
        "seconds": time.monotonic() - start,
    }
    write_result(out, result)
    return result


def run(command: AttentionCommand) -> None:
    with command.machine.running(), shown([Stage("attention", 30)] * len(command.models)) as progress:
        found = run_attention(command.models, command, progress)
    rows = [{"name": f"{r['model']}, block {r['block'] + 1}"} | r for r in found["attention"]]
    show(f"mean distance of two heads of a block, {found['images']} images", rows)
    print(f"{found['csv']}\n{found['figure']}")
