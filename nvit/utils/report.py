"""What a command leaves behind: result.json, CSV rows, and tables for people."""

from __future__ import annotations

import csv
import io
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FORMATS = {
    "params": ("params M", lambda v: f"{v / 1e6:.2f}"),
    "macs": ("GMACs", lambda v: f"{v / 1e9:.3f}"),
    "bytes": ("MB", lambda v: f"{v / 1e6:.2f}"),
    "difference": ("max difference", lambda v: f"{v:.1e}"),
    "tokens": ("tokens", lambda v: f"{v[0]} → {v[-1]}"),
    "predicted_ratio": ("predicted ×", lambda v: f"{v:.3f}"),
    "measured_ratio": ("measured ×", lambda v: f"{v:.3f}"),
    "latency_ms": ("ms", lambda v: f"{v:.2f}"),
    "images_per_s": ("images/s", lambda v: f"{v:.1f}"),
    "speedup": ("speed-up ×", lambda v: f"{v:.2f}"),
    "peak_memory": ("peak MB", lambda v: f"{v / 1e6:.1f}"),
    "top1": ("top-1 %", lambda v: f"{v:.2f}"),
    "top5": ("top-5 %", lambda v: f"{v:.2f}"),
    "mAP": ("mAP %", lambda v: f"{v:.2f}"),
    "miou": ("mIoU %", lambda v: f"{v:.2f}"),
    "pixel_accuracy": ("pixels %", lambda v: f"{v:.2f}"),
    "accuracy": ("right %", lambda v: f"{v:.2f}"),
    "mae": ("MAE", lambda v: f"{v:.4g}"),
    "rmse": ("RMSE", lambda v: f"{v:.4g}"),
    "r2": ("R²", lambda v: f"{v:.4f}"),
    "cosine": ("cosine", lambda v: f"{v:.4f}"),
    "knn": ("k-NN %", lambda v: f"{v:.2f}"),
    "probe": ("linear probe %", lambda v: f"{v:.2f}"),
    "spearman": ("Spearman", lambda v: f"{v:.3f}"),
    "emb": ("EMB", str),
    "heads": ("heads", str),
    "qk_dim": ("QK per head", str),
    "v_dim": ("V per head", str),
    "mlp": ("MLP", str),
    "map_distance": ("of attention maps", lambda v: f"{v:.3f}"),
    "output_distance": ("of outputs, 1 - CKA", lambda v: f"{v:.3f}"),
    "trace": ("Hessian", lambda v: f"{v:.2e}"),
    "gauss_newton": ("Gauss-Newton", lambda v: f"{v:.2e}"),
    "latency_per_unit": ("latency a unit", lambda v: f"{v:.2e}"),
    "loss_change_per_saliency": ("loss change per saliency", lambda v: f"{v:.3g}"),
}
"""Column heads with units and number formats of tables, by key of result.json."""

OFF = {"top1": "top1_se", "knn": "knn_se", "probe": "probe_se", "measured_ratio": "measured_spread"} | {
    key: f"{key}_se" for key in ("trace", "gauss_newton", "map_distance")
}
"""By key, the key of how far its value may be off, shown behind it."""

RESULT = "result.json"
"""The file in which every command leaves what it found; a run's folder that has it is finished."""


def write_result(folder: Path | str, result: Mapping[str, Any], name: str = RESULT) -> None:
    """`RESULT` in `folder`, or a file of another name."""
    write_atomically(Path(folder) / name, (json.dumps(result, indent=2) + "\n").encode())


def write_csv(path: Path | str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows under the union of their keys, in order of appearance."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(Path(path), text.getvalue().encode())


def in_time(seconds: float) -> str:
    """Seconds for people: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


DROPPED = ("peak_memory", "top5", "images_per_s", "macs", "predicted_ratio", "params", "speedup", "measured_ratio")
"""Columns that a narrow terminal goes without, the first first."""

PIPED = 160
"""Columns of a table that goes to no terminal, where the environment's COLUMNS does not say."""


def show(title: str, rows: Sequence[Mapping[str, Any]], console: Console | None = None, *, head: str = "model") -> None:
    """A table of rows, each with a `name` (under `head`) and any keys of `FORMATS`. Where it is too wide, columns are
    left out and named; numbers and the title's words are never cut."""
    from rich.console import Console

    console = console or Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(file=console.file, width=PIPED)
    console.on_broken_pipe = _broken_pipe
    width = console.width
    keys = [k for k in FORMATS if any(row.get(k) is not None for row in rows)]
    dropped = []
    while Console(width=10 * PIPED).measure(table := _table(rows, keys, head)).maximum > width:
        if (key := next((k for k in DROPPED if k in keys), None)) is None:
            break
        keys.remove(key)
        dropped.append(FORMATS[key][0])
    _print(console, title, width)
    console.print(table)
    if dropped:
        _print(console, f"no room at {width} columns for: {', '.join(dropped)}", width)


def _broken_pipe() -> None:
    """Of a reader who has left, instead of rich's own end of the program: the command's caller answers it."""
    raise BrokenPipeError


def _print(console: Console, text: str, width: int) -> None:
    """Words on lines of so many columns, none of them broken."""
    for line in textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], head: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(head, overflow="fold")
    for key in keys:
        table.add_column(FORMATS[key][0], justify="right", no_wrap=True)
    for row in rows:
        short = "/".join(Path(row["name"]).parts[-2:])
        table.add_row(short, *(_cell(row, k) for k in keys))
    return table


def _cell(row: Mapping[str, Any], key: str) -> str:
    """A value of a row for people, with how far it may be off where the row says."""
    if row.get(key) is None:
        return "–"
    in_words, off = FORMATS[key][1], row.get(OFF.get(key, ""))
    return in_words(row[key]) + (f" ± {in_words(off)}" if off else "")
