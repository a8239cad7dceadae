"""What a notebook shows of an object: tables as HTML, in the look of the notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .report import FORMATS


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table, text to the left in its first column and to the right in the others."""
    side = ["left", *["right"] * (len(heads) - 1)]

    def row(tag: str, cells: Sequence[object]) -> str:
        inner = (f'<{tag} style="text-align:{s}">{escape(str(c))}</{tag}>' for s, c in zip(side, cells, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    return f"<table><thead>{row('th', heads)}</thead><tbody>{''.join(row('td', r) for r in rows)}</tbody></table>"


def line(text: str) -> str:
    """A line of text."""
    return f"<p>{escape(text)}</p>"


def measured(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows with a `name` and any keys of `report.FORMATS`."""
    keys = [k for k in FORMATS if any(row.get(k) is not None for row in rows)]
    cells = ([r["name"], *("–" if r.get(k) is None else FORMATS[k][1](r[k]) for k in keys)] for r in rows)
    return table(["model", *(FORMATS[k][0] for k in keys)], cells)


def folded(title: str, inside: str) -> str:
    """HTML that opens when its title is clicked."""
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"
