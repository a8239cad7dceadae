"""The figure of a kernel's benchmark."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nvit.analysis.figure import PAGE, PIXELS, panels
from nvit.utils.style import ACCENT, BEHIND

if TYPE_CHECKING:
    from benchmarks.harness import Row


def figure(rows: Sequence[Row], op: str, path: Path, ours: str, pixels: int = PIXELS) -> None:
    """Median ms a provider, one panel a case, with bars from the 20th to the 80th percentile; `ours` in a colour."""
    timed = [r for r in rows if r.median_ms is not None and not r.case.startswith("ceiling")]
    names = list(dict.fromkeys(r.case for r in timed))
    if not names:
        return
    height = [0.65 + 0.24 * sum(r.case == n for r in timed) for n in names]
    title = f"{op} · {rows[0].device}"
    with panels(len(names), path, pixels=pixels, width=PAGE, height=height, title=title) as axes:
        for panel, name in zip(axes, names, strict=True):
            mine = [r for r in timed if r.case == name]
            below = [max(0.0, r.median_ms - r.p20_ms) for r in mine]
            above = [max(0.0, r.p80_ms - r.median_ms) for r in mine]
            colours = [ACCENT if r.provider.startswith(ours) else BEHIND for r in mine]
            providers = [r.provider for r in mine]
            panel.barh(providers, [r.median_ms for r in mine], xerr=[below, above], color=colours)
            panel.invert_yaxis()
            panel.grid(axis="y", visible=False)
            panel.set_title(textwrap.fill(name, 52), loc="left", fontsize=8.5, fontweight="normal")
        axes[-1].set_xlabel("ms")
