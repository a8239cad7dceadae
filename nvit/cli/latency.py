"""`nvit latency`: measure a latency table, or show one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from ..config import _help
from ..latency.table import LatencyTable
from ..spec import BUNDLE_SIZES, KINDS
from ..utils.progress import Progress
from ..utils.report import write_result
from .command import Command
from .flags import DIGITS, Flat, LatencyFlags, MachineFlags, ModelFlags
from .inputs import open_table
from .models import open_model
from .progress import shown


@dataclass(frozen=True, kw_only=True)
class LatencyCommand:
    """Measure a latency table, or show one."""

    model: Annotated[str, _help("a timm name, a snapshot folder, or a Hugging Face folder")] = DIGITS
    table: Annotated[str, _help("show this table instead of measuring; or `analytic`")] = ""
    latency_batch: Annotated[int, _help("images a batch")] = 64
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], _help("of weights and images")] = "float32"
    latency_seconds: Annotated[float, _help("time for measuring")] = 40.0
    out: Annotated[str, _help("folder for latency_table.json and result.json; none if empty")] = ""
    opening: Flat[ModelFlags] = field(default_factory=ModelFlags)
    machine: Flat[MachineFlags] = field(default_factory=MachineFlags)


def run_latency(command: LatencyCommand, progress: Progress) -> tuple[LatencyTable, dict[str, Any]]:
    """The table, and what goes into result.json."""
    if command.table and command.table != "analytic":
        table = LatencyTable.load(command.table)
    else:
        # Latency does not depend on the weights: none are fetched.
        opening = dataclasses.replace(command.opening, pretrained=False)
        model = open_model(command.model, opening, command.machine.pick()).to(getattr(torch, command.dtype))
        flags = LatencyFlags(
            table=command.table, latency_batch=command.latency_batch, latency_seconds=command.latency_seconds
        )
        table = open_table(model, flags, BUNDLE_SIZES, progress)
    setting = None if table.setting is None else dataclasses.asdict(table.setting)
    found = {"model": command.model, "dense_ms": table.dense_ms, "setting": setting} | table.slopes()
    if command.out:
        table.save(Path(command.out) / "latency_table.json")
        write_result(command.out, found)
    return table, found


def run(command: LatencyCommand, words: Sequence[str]) -> None:
    with command.machine.running(), shown() as progress:
        table, found = run_latency(command, progress)
    where = "multiply-accumulates, 1 G counted as 1 ms"
    if table.setting is not None:
        s = table.setting
        where = f"{s.device}, {s.dtype}, batch {s.batch_size}, {s.tokens} tokens, {s.versions}"
    print(where)
    print(f"dense model: {found['dense_ms']:.3f} ms; ms saved per unit, mean over the range:")
    for kind in KINDS:
        print(f"  {kind:8s}{found[f'ms_per_{kind}']:.5f}")
    if command.out:
        print(f"{command.out}/latency_table.json")


COMMAND = Command(LatencyCommand, "[RECIPE.toml]", run)
