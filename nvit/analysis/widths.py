"""Which widths of pruned models survive, block by block (arXiv:2110.04869, Fig. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..spec import KINDS, TITLES, BlockWidths
from ..utils.style import BEHIND, line
from .figure import PIXELS, legend_below, panels, whole_numbers


def width_rows(
    models: Mapping[str, Sequence[BlockWidths]], merges: Mapping[str, Sequence[int]] | None = None
) -> list[dict[str, Any]]:
    """One row per model and block: `model, block, emb, heads, qk_dim, v_dim, mlp`, and where a model of `merges` has
    any, `merged`: how many tokens merge there."""
    rows = [
        {"model": name, "block": i} | {kind: getattr(widths, kind) for kind in KINDS}
        for name, blocks in models.items()
        for i, widths in enumerate(blocks)
    ]
    if any(map(any, (merges or {}).values())):
        for row in rows:
            mine = merges.get(row["model"]) or ()
            row["merged"] = mine[row["block"]] if mine else 0
    return rows


def plot_widths(
    models: Mapping[str, Sequence[BlockWidths]],
    path: Path | str,
    dense: Sequence[BlockWidths] | None = None,
    pixels: int = PIXELS,
) -> None:
    """A panel per width, a line per model, over the blocks, counted from 1.

    Args:
        dense: what all of them were cut from, as bars behind.
    """
    depth = max(map(len, (*models.values(), dense or ())))
    with panels(len(KINDS), path, pixels=pixels) as axes:
        shown: dict[str, Any] = {}
        for panel, kind in zip(axes, KINDS, strict=True):
            if dense is not None:
                values = [getattr(b, kind) for b in dense]
                shown["dense"] = panel.bar(range(1, len(dense) + 1), values, width=0.8, color=BEHIND, zorder=1)
            for i, (name, blocks) in enumerate(models.items()):
                values = [getattr(b, kind) for b in blocks]
                (drawn,) = panel.plot(range(1, len(blocks) + 1), values, **line(i), markersize=3.5, zorder=2)
                shown["/".join(Path(name).parts[-2:])] = drawn
            most = max(getattr(b, kind) for blocks in (*models.values(), dense or ()) for b in blocks)
            panel.set(title=TITLES[kind], xlabel="block", xlim=(0.4, depth + 0.6), ylim=(0, 1.12 * most))
            panel.grid(axis="x", visible=False)
            whole_numbers(panel.xaxis)
            whole_numbers(panel.yaxis, min(6, most))
        legend_below(axes[0], shown)
