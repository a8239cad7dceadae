"""What a command leaves behind: result.json, CSV rows, and tables for people."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .files import write_atomically

FORMATS = {
    "params": ("parameters", lambda v: f"{v / 1e6:.2f} M"),
    "macs": ("MACs", lambda v: f"{v / 1e9:.3f} G"),
    "predicted_ratio": ("predicted", lambda v: f"{v:.3f} ×"),
    "measured_ratio": ("measured", lambda v: f"{v:.3f} ×"),
    "latency_ms": ("latency", lambda v: f"{v:.2f} ms"),
    "speedup": ("speed-up", lambda v: f"{v:.2f} ×"),
    "peak_memory": ("peak memory", lambda v: f"{v / 1e6:.1f} MB"),
    "top1": ("top-1", lambda v: f"{v:.2f} %"),
    "top5": ("top-5", lambda v: f"{v:.2f} %"),
}
"""Column heads and number formats of tables, by key of result.json."""


def write_result(folder: Path | str, result: Mapping[str, Any]) -> None:
    """`result.json` in `folder`."""
    write_atomically(Path(folder) / "result.json", (json.dumps(result, indent=2) + "\n").encode())


def write_csv(path: Path | str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows under the union of their keys, in order of appearance."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(Path(path), text.getvalue().encode())


def show(title: str, rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """A table of rows, each with a `name` and any keys of `FORMATS`."""
    keys = [k for k in FORMATS if any(row.get(k) is not None for row in rows)]
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for key in keys:
        table.add_column(FORMATS[key][0], justify="right")
    for row in rows:
        table.add_row(row["name"], *(FORMATS[k][1](row[k]) if row.get(k) is not None else "–" for k in keys))
    (console or Console()).print(table)
