"""Files of a run one by one: each gives what it holds, or a sentence that says what is wrong with it."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..latency.table import LatencyTable
from ..spec import BlockWidths
from ..structure import snapshot
from ..structure.skeleton import tokens_by_block
from ..utils.files import short

UNDECIDED = ("candidate", "polish_seconds")
"""Columns of rows of `history.csv` that tell of something else than a decision."""


@dataclass(frozen=True)
class Table:
    """Of a latency table what a page needs: the dense model's widths, and the setting by name; empty if not there."""

    dense: tuple[BlockWidths, ...] = ()
    setting: Mapping[str, Any] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class History:
    """Rows of `history.csv`, numbers alone."""

    rows: tuple[Mapping[str, float], ...] = ()
    absent: tuple[str, ...] = ()


def numbers(raw: Any) -> dict[str, float]:
    """The finite numbers among an object's values, by key; none of what is no object."""
    items = raw.items() if isinstance(raw, Mapping) else ()
    return {str(k): v for k, v in items if type(v) in (int, float) and abs(v) < 1e300 and math.isfinite(v)}


def plain(raw: Any) -> dict[str, Any]:
    """An object's values that can be shown on a line: words, numbers, yes and no, lists of them."""
    items = raw.items() if isinstance(raw, Mapping) else ()
    return {str(k): v for k, v in items if isinstance(v, (str, int, float, bool, list, tuple))}


def table_of(folder: Path) -> Table:
    """What the latency table of a run says."""
    file = folder / "latency_table.json"
    if not file.exists():
        return Table(absent=("the latency table is not there",))
    try:
        table = LatencyTable.load(file)
    except (ValueError, OSError) as e:
        return Table(absent=(short(e),))
    return Table(table.dense, {} if table.setting is None else asdict(table.setting))


def history_of(folder: Path) -> History:
    """What the decisions of a run were."""
    file = folder / "history.csv"
    if not file.exists():
        return History(absent=("the history of decisions is not there",))
    try:
        with file.open(newline="") as f:
            rows = tuple(numbers({k: _number(v) for k, v in row.items()}) for row in csv.DictReader(f))
    except (OSError, ValueError, csv.Error) as e:
        return History(absent=(f"{file} cannot be read: {short(e)}",))
    kept = tuple(row for row in rows if "predicted_ratio" in row)
    decided = tuple(row for row in kept if not any(row.get(name) for name in UNDECIDED))
    return History(decided, () if len(kept) == len(rows) else (f"{file} has rows without a predicted_ratio",))


def left_in(folder: Path) -> tuple[dict[str, tuple], list[str]]:
    """What a snapshot keeps, as `Model` takes it, and what is wrong with it."""
    if not snapshot.is_snapshot(folder):
        return {}, [f"the snapshot {folder.name}/ is not there"]
    try:
        spec = snapshot.load_spec(folder)
        return {"widths": spec.blocks, "tokens": tuple(tokens_by_block(spec))}, []
    except (ValueError, OSError) as e:
        return {}, [short(e)]


def _number(word: Any) -> float | None:
    try:
        return float(word)
    except (TypeError, ValueError):
        return None
