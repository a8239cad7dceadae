"""Which widths of pruned models survive, block by block (arXiv:2110.04869, Fig. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..spec import KINDS, TITLES, BlockWidths
from .figure import panels


def width_rows(models: Mapping[str, Sequence[BlockWidths]]) -> list[dict[str, Any]]:
    """One row per model and block: `model, block, emb, heads, qk_dim, v_dim, mlp`."""
    return [
        {"model": name, "block": i} | {kind: getattr(widths, kind) for kind in KINDS}
        for name, blocks in models.items()
        for i, widths in enumerate(blocks)
    ]


def plot_widths(models: Mapping[str, Sequence[BlockWidths]], path: Path | str) -> None:
    """A panel per width, a line per model, over the blocks."""
    with panels(len(KINDS), 3.2, 2.8, path, sharex=True) as axes:
        for panel, kind in zip(axes, KINDS, strict=True):
            for name, blocks in models.items():
                panel.plot(range(1, len(blocks) + 1), [getattr(b, kind) for b in blocks], marker="o", ms=3, label=name)
            panel.set(title=TITLES[kind], xlabel="block")
            panel.set_ylim(bottom=0)
        axes[0].set_ylabel("width")
        axes[0].legend(fontsize="small")
