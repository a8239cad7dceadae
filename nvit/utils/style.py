"""How all figures look: one palette, one set of matplotlib's settings, no drawing.

Colours are told apart by colour-blind readers (Okabe and Ito's set and a purple) and, since each is lighter or darker
than its neighbours and has a marker and a dash of its own, on grey paper too.
"""

from __future__ import annotations

from typing import Any

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#5A1E5A")
"""In the order in which lines of a figure take them."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = (
    "-",
    (0, (6, 2)),
    (0, (2, 1.5)),
    (0, (6, 2, 1.5, 2)),
    (0, (4, 1)),
    (0, (1, 1)),
    (0, (8, 2, 1, 2, 1, 2)),
    (0, (3, 3)),
)

ACCENT, INK, BEHIND = COLOURS[0], "#333333", "#D9D9D9"
"""Of what a figure is about, of its text, and of what stands behind for comparison."""

SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.titlesize": 10.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "errorbar.capsize": 2.5,
    "savefig.facecolor": "white",
}
"""matplotlib's, by its names."""


def line(i: int) -> dict[str, Any]:
    """Colour, marker and dash of the i-th line of a figure."""
    i %= len(COLOURS)
    return {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": DASHES[i]}
