"""`nvit latency`: measure a latency table, or show one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..latency.table import LatencyTable
from ..spec import BUNDLE_SIZES, KINDS
from ..utils.progress import Progress
from ..utils.report import write_result
from ..utils.stages import Stage
from .flags.latency import LatencyCommand
from .models import is_snapshot, open_model
from .progress import shown
from .tables import open_table


def run_latency(command: LatencyCommand, progress: Progress) -> tuple[LatencyTable, dict[str, Any]]:
    """The table, and what goes into result.json."""
    if command.shows:
        table = LatencyTable.load(command.latency.table)
    else:
        # Latency does not depend on the weights: none are fetched. A snapshot has its own.
        own = is_snapshot(command.model)
        opening = command.opening if own else dataclasses.replace(command.opening, pretrained=False)
        model = open_model(command.model, opening, command.machine.pick())
        table = open_table(model, command.latency, BUNDLE_SIZES, progress)
    setting = None if table.setting is None else dataclasses.asdict(table.setting)
    found = {"model": command.model, "dense_ms": table.dense_ms, "setting": setting} | table.slopes()
    if command.out:
        table.save(Path(command.out) / "latency_table.json")
        write_result(command.out, found)
    return table, found


def run(command: LatencyCommand) -> None:
    with command.machine.running(), shown([Stage("measuring latency", 1, command.latency.latency_seconds)]) as progress:
        table, found = run_latency(command, progress)
    where = "multiply-accumulates, 1 G counted as 1 ms"
    if table.setting is not None:
        s = table.setting
        how = s.mode if s.runtime == "torch" else s.runtime
        where = f"{s.device}, {s.dtype}, {how}, batch {s.batch_size}, {s.tokens} tokens, {s.versions}"
    print(where)
    rate = "" if table.setting is None else f", {1e3 * table.setting.batch_size / table.dense_ms:.1f} images/s"
    print(f"dense model: {found['dense_ms']:.3f} ms{rate}; ms saved per unit, mean over the range:")
    for kind in KINDS:
        print(f"  {kind:8s}{found[f'ms_per_{kind}']:.5f}")
    if command.out:
        print(f"{command.out}/latency_table.json")
