"""What a person sees of a pruned model: rows, a data frame, and a picture of its widths for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..spec import KINDS, TITLES, BlockWidths
from ..utils import html
from ..utils.style import ACCENT, BEHIND, INK

PANEL, GAP, HEIGHT, HEAD = 118, 14, 56, 18
"""Pixels of a panel's width, between two, of its bars, and of its title."""


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows as a pandas DataFrame.

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError:
        raise ModuleNotFoundError("to_frame needs pandas, which is not here; run `pip install pandas`") from None
    return pandas.DataFrame(rows)


def page(
    title: str, rows: Sequence[Mapping[str, Any]], dense: Sequence[BlockWidths], models: Mapping[str, Sequence]
) -> str:
    """HTML: a table of `rows`, and widths block by block of each of `models` before what they were in `dense`."""
    pictures = "".join(picture(f"{name}, block by block", dense, blocks) for name, blocks in models.items())
    return html.line(title) + html.measured(rows) + pictures


def picture(title: str, dense: Sequence[BlockWidths], blocks: Sequence[BlockWidths]) -> str:
    """An SVG with a panel per width, a bar per block: what is left before what the dense model has."""
    parts = [_text(0, 12, title, bold=True)]
    for i, kind in enumerate(KINDS):
        whole, left = ([getattr(b, kind) for b in widths] for widths in (dense, blocks))
        x, floor, step = i * (PANEL + GAP), 2 * HEAD + HEIGHT, PANEL / len(whole)
        parts.append(_text(x, 2 * HEAD - 6, f"{TITLES[kind]} {_span(whole)} → {_span(left)}"))
        for colour, values in ((BEHIND, whole), (ACCENT, left)):
            for b, value in enumerate(values):
                tall = HEIGHT * value / max(whole)
                size = f'x="{x + b * step:.1f}" y="{floor - tall:.1f}" width="{0.8 * step:.1f}" height="{tall:.1f}"'
                parts.append(f'<rect {size} fill="{colour}"/>')
    width, height = len(KINDS) * (PANEL + GAP), 2 * HEAD + HEIGHT + 4
    label = escape(f"widths of {title}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{label}" style="background:white">{"".join(parts)}</svg>'
    )


def _span(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return str(most) if least == most else f"{least}–{most}"


def _text(x: float, y: float, text: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="9" font-family="sans-serif" fill="{INK}"{weight}>{escape(text)}</text>'
