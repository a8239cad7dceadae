"""Rows of tables that take long: each is in the CSV as soon as it is known."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Records


class Rows(Records):
    """`Records` that are on disk after every `add`."""

    def add(self, **row: Any) -> None:
        super().add(**row)
        self.save()


class Resumed(Rows):
    """`Rows` that begin with those that the file has, so that a run that was stopped goes on.

    Args:
        key: the columns that say which point a row is of; a later row of the same point takes its place.
        order: rows ascend by it, where it is given.
    """

    def __init__(
        self,
        name: str,
        key: Sequence[str],
        of: torch.device | str = "cpu",
        folder: Path | None = None,
        order: Callable[[Mapping[str, Any]], Any] | None = None,
    ) -> None:
        super().__init__(name, of, folder)
        self.key, self.order = tuple(key), order
        self.rows = list(rows_of(self.path))

    def find(self, **point: Any) -> dict[str, Any] | None:
        """The row of a point, None where there is none yet."""
        return next((r for r in self.rows if self._point(r) == self._point(point)), None)

    def add(self, **row: Any) -> None:
        self.rows = [r for r in self.rows if self._point(r) != self._point(row)]
        super().add(**row)

    def save(self) -> None:
        if self.order is not None:
            self.rows.sort(key=self.order)
        super().save()

    def _point(self, row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in self.key)


def rows_of(path: Path) -> list[dict[str, str]]:
    """Rows that a file of results has; none where there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
