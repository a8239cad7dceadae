"""Rows of a CSV of benchmarks/results, and a Markdown table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
Row = dict[str, str]


def rows(name: str) -> list[Row]:
    """All rows of `benchmarks/results/<name>.csv`."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)) + "\n"


def gain(row: Row, *keys: str) -> str:
    """A mean and its interval, signed: `+1.2 (-0.3 to +2.7)`."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(float(row[k]) for k in keys))
