"""Rows of a table that takes long: each is in the CSV as soon as it is known."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from benchmarks.harness import Records


class Rows(Records):
    """`Records` that are on disk after every `add`."""

    def add(self, **row: Any) -> None:
        super().add(**row)
        self.save()


def rows_of(path: Path) -> list[dict[str, str]]:
    """Rows that a file of results has; none where there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
