"""`nvit export`: a compact model as files of other runtimes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import adapters
from ..export.export import Written, export, images_wanted, seeded_images
from ..export.registry import FORMATS
from ..latency.clock import time_each
from ..utils.progress import Progress
from ..utils.report import show, write_result
from ..utils.stages import Stage
from .flags.export import ExportCommand
from .inputs import has_images, open_images
from .models import open_model
from .progress import shown


def run_export(command: ExportCommand, progress: Progress) -> dict[str, Any]:
    """What goes into result.json."""
    model = open_model(command.model, command.opening, torch.device("cpu"))
    images = _images(model, command)
    written = export(
        model,
        command.out,
        command.format,
        images=images,
        static=command.static_batch,
        opset=command.opset,
        dtype=command.dtype,
        external_bytes=int(command.external_mb * 1e6),
        threads=torch.get_num_threads(),
        progress=progress,
    )
    batch = command.static_batch or 1
    found = {
        "model": command.model,
        "checked_on": "seeded noise" if images is None else command.where.data or command.where.eval_data or "digits",
        "batch": command.static_batch or "any",
        "latency_batch": batch,
        "threads": torch.get_num_threads(),
        "dtype": command.dtype,
        "opset": command.opset,
        "preprocess": {k: list(v) if isinstance(v, tuple) else v for k, v in adapters.preprocess(model).items()},
        "files": [dataclasses.asdict(w) | {"latency_ms": _ms(w, model, command, batch)} for w in written],
    }
    write_result(command.out, found)
    return found


def _images(model: nn.Module, command: ExportCommand) -> Tensor | None:
    """Images to compare outputs on, spread over the data; None where none is named."""
    if not has_images(model, command.where):
        return None
    wanted = images_wanted(command.static_batch)
    loader = open_images(model, command.where, task=command.task).evaluation(wanted, wanted, own=True)
    return torch.cat([images for images, *_ in loader])[:wanted]


def _ms(written: Written, model: nn.Module, command: ExportCommand, batch: int) -> float | None:
    """Milliseconds of a batch in the file's runtime."""
    if not command.seconds:
        return None
    run = FORMATS[written.format].open(Path(written.path), torch.get_num_threads())
    images = seeded_images(model, batch).to(getattr(torch, command.dtype))
    with torch.no_grad():
        return time_each([lambda: run(images)], "cpu", command.seconds)[0]


def stages(command: ExportCommand) -> list[Stage]:
    """What an export does."""
    return [Stage("exporting", 10 * len(command.format))]


def run(command: ExportCommand) -> None:
    with command.machine.running(), shown(stages(command)) as progress:
        found = run_export(command, progress)
    sizes = found["files"][0]["batches"]
    title = (
        f"{found['model']}: {found['dtype']}, batch of {found['batch']}; compared on {found['checked_on']} at "
        f"{' and '.join(map(str, sizes))} images a batch; ms of {found['latency_batch']} on {found['threads']} "
        f"thread{'s' * (found['threads'] > 1)}"
    )
    show(title, [{"name": row["path"]} | row for row in found["files"]], head="file")
    for row in found["files"]:
        print(
            f"{row['path']}: {row['runtime']}" + (f"; with {', '.join(row['files'][1:])}" if row["files"][1:] else "")
        )
    print(f"{command.out}/result.json")
