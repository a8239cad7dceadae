"""`nvit analyze widths`: the paper's Fig. 4 for any snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..analysis import widths
from ..structure import snapshot
from ..utils.report import write_csv, write_result
from .flags.widths import WidthsCommand
from .models import snapshot_of


def run_widths(names: Sequence[str], command: WidthsCommand) -> dict[str, Any]:
    """What goes into result.json."""
    models = {name: snapshot.load_spec(snapshot_of(name, command.target)).blocks for name in names}
    rows = widths.width_rows(models)
    out = Path(command.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "widths.csv", rows)
    widths.plot_widths(models, out / "widths.png")
    result = {"widths": rows, "csv": str(out / "widths.csv"), "figure": str(out / "widths.png")}
    write_result(out, result)
    return result


def run(command: WidthsCommand) -> None:
    found = run_widths(command.models, command)
    print(f"{found['csv']}\n{found['figure']}")
