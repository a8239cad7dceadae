"""Accuracy against what a model costs: measured latency, multiply-accumulates, or both side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tasks.classification import standard_error
from ..utils.style import line
from .figure import PIXELS, legend_below, panels


@dataclass(frozen=True)
class Against:
    """A panel of an accuracy curve.

    Attributes:
        key: of the rows; a row without it is left out. `<key>_low` and `<key>_high` make a bar, where a row has them.
        label: of the axis.
        only: a row's `case`, where not all rows belong here.
    """

    key: str
    label: str
    title: str = ""
    only: str = ""


def plot_accuracy(
    lines: Mapping[str, Sequence[Mapping[str, Any]]],
    against: Sequence[Against],
    path: Path | str,
    *,
    images: int,
    title: str = "",
    pixels: int = PIXELS,
) -> None:
    """A panel for each of `against`, a line for each of `lines`, bars of one standard error.

    Args:
        lines: rows with `top1` in percent, and the keys of `against`.
        images: that accuracy was measured on.
    """
    with panels(len(against), path, pixels=pixels, height=2.9, width=2.9, title=title, sharey=True) as axes:
        shown: dict[str, Any] = {}
        for panel, cost in zip(axes, against, strict=True):
            for i, (name, rows) in enumerate(lines.items()):
                mine = [r for r in rows if r.get(cost.key) is not None and cost.only in ("", r.get("case"))]
                mine.sort(key=lambda r: r[cost.key])
                if not mine:
                    continue
                x, y = ([float(r[key]) for r in mine] for key in (cost.key, "top1"))
                bars = {"yerr": [standard_error(v, images) for v in y]}
                if all(f"{cost.key}_low" in r for r in mine):
                    below = [r[cost.key] - r[f"{cost.key}_low"] for r in mine]
                    above = [r[f"{cost.key}_high"] - r[cost.key] for r in mine]
                    bars["xerr"] = [below, above]
                shown[name] = panel.errorbar(x, y, **bars, **line(i), elinewidth=0.9)
            panel.set(xlabel=cost.label, title=cost.title)
            panel.set_ylim(bottom=0)
        axes[0].set_ylabel(f"top-1 %, ± standard error\nof {images} images")
        legend_below(axes[0], shown)
