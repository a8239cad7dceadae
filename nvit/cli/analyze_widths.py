"""`nvit analyze widths`: the paper's Fig. 4 for any snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..analysis import widths
from ..config import _help
from ..structure import snapshot
from ..structure.skeleton import dense_blocks
from ..utils.report import write_csv, write_result
from .command import Command
from .flags import DIGITS


@dataclass(frozen=True, kw_only=True)
class WidthsCommand:
    """Widths of every block of one or several snapshots, as a CSV and a figure (the paper's Fig. 4)."""

    out: Annotated[str, _help("folder for widths.csv, widths.png and result.json")] = "nvit-widths"


def run_widths(names: Sequence[str], command: WidthsCommand) -> dict[str, Any]:
    """What goes into result.json."""
    specs = {name: snapshot.load_spec(snapshot.BUNDLED if name == DIGITS else name) for name in names}
    models = {name: spec.blocks for name, spec in specs.items()}
    dense = {dense_blocks(spec) for spec in specs.values()}
    rows = widths.width_rows(models)
    out = Path(command.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "widths.csv", rows)
    widths.plot_widths(models, out / "widths.png", dense.pop() if len(dense) == 1 else None)
    result = {"widths": rows, "csv": str(out / "widths.csv"), "figure": str(out / "widths.png")}
    write_result(out, result)
    return result


def run(command: WidthsCommand, words: Sequence[str]) -> None:
    found = run_widths(words, command)
    print(f"{found['csv']}\n{found['figure']}")


COMMAND = Command(WidthsCommand, "SNAPSHOT …", run, 1, None)
