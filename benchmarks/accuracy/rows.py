"""Rows of a table that takes long: each is in the CSV as soon as it is known."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Records


class Rows(Records):
    """`Records` that are on disk after every `add`."""

    def add(self, **row: Any) -> None:
        super().add(**row)
        self.save()
