"""What all figures share: panels in rows, the house's style, drawn without a screen, saved as a PNG.

A figure is 600 pixels wide or 1600: for a narrow column, or for twice the dots of a page's width. Its text has the same
size on paper in both, and panels go into as many columns as they find room.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.style import SETTINGS

PIXELS = 1600
"""Width of a figure where nobody says otherwise."""
PAGE = 8.0
"""Inches of a page's width; a narrower figure has 100 dots an inch."""


@contextlib.contextmanager
def panels(
    count: int,
    path: Path | str,
    *,
    pixels: int = PIXELS,
    width: float = 2.6,
    height: float | Sequence[float] = 2.2,
    title: str = "",
    **shared: bool,
) -> Iterator[list[Any]]:
    """`count` axes to draw on, row by row; saved to `path` when the block ends.

    Args:
        pixels: of the whole figure's width.
        width: inches that a panel needs at least.
        height: inches of a panel, or of each row.
        shared: `sharex` or `sharey`, as `subplots` takes them.
    """
    import matplotlib
    from matplotlib.figure import Figure

    inches = min(pixels / 100, PAGE)
    columns = max(1, min(count, int(inches / width)))
    rows = math.ceil(count / columns)
    columns = math.ceil(count / rows)  # as full as rows can be
    heights = [height] * rows if isinstance(height, (int, float)) else list(height)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((inches, sum(heights) + (0.3 if title else 0)), dpi=pixels / inches, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights, **shared).flatten()
        for spare in axes[count:]:
            spare.remove()
        if title:
            figure.suptitle(title)
        yield list(axes[:count])
        figure.savefig(path)


def legend_below(axes: Any, handles: Mapping[str, Any]) -> None:
    """One legend for all panels of a figure, under them, in as many columns as fit."""
    figure = axes.figure
    for columns in range(len(handles), 0, -1):
        even = math.ceil(len(handles) / math.ceil(len(handles) / columns))  # rows as full as the columns let them be
        legend = figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=even)
        if columns == 1 or legend.get_window_extent().width <= 0.96 * figure.bbox.width:
            return
        legend.remove()


def whole_numbers(axis: Any, most: int = 6) -> None:
    """Integers alone on an axis, at most so many."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))


def few_decades(axis: Any, most: int = 4) -> None:
    """At most so many powers of ten on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(numticks=most))
    axis.set_minor_locator(NullLocator())


def both_signs(axis: Any, values: Sequence[float], most: int = 4) -> None:
    """A logarithmic axis that shows losses and gains, linear around zero: up to so many powers of ten to each side."""
    from matplotlib.ticker import FixedLocator, NullLocator

    sizes = sorted(abs(v) for v in values)
    least = max(1e-12, sizes[len(sizes) // 2] / 30)
    axis.axes.set_yscale("symlog", linthresh=least)
    first, ticks = math.ceil(math.log10(least) + 0.5), [0.0]
    for sign in (1, -1):
        end = max((abs(v) for v in values if v * sign > 0), default=0.0)
        powers = range(first, math.floor(math.log10(end)) + 1) if end else range(0)
        ticks += [sign * 10.0**p for p in powers[:: math.ceil(len(powers) / most) or 1]]
    axis.set_major_locator(FixedLocator(sorted(ticks)))
    axis.set_minor_locator(NullLocator())
