"""The paper's analyses of pruned models: which widths survive, block by block (Fig. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..spec import KINDS, BlockWidths

TITLES = {"emb": "EMB", "heads": "heads", "qk_dim": "QK per head", "v_dim": "V per head", "mlp": "MLP"}


def width_rows(models: Mapping[str, Sequence[BlockWidths]]) -> list[dict[str, Any]]:
    """One row per model and block: `model, block, emb, heads, qk_dim, v_dim, mlp`."""
    return [
        {"model": name, "block": i} | {kind: getattr(widths, kind) for kind in KINDS}
        for name, blocks in models.items()
        for i, widths in enumerate(blocks)
    ]


def plot_widths(models: Mapping[str, Sequence[BlockWidths]], path: Path | str) -> None:
    """A panel per width, a line per model, over the blocks (arXiv:2110.04869, Fig. 4)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(KINDS), figsize=(3.2 * len(KINDS), 2.8), sharex=True, layout="constrained")
    for panel, kind in zip(panels, KINDS, strict=True):
        for name, blocks in models.items():
            panel.plot(range(1, len(blocks) + 1), [getattr(b, kind) for b in blocks], marker="o", ms=3, label=name)
        panel.set(title=TITLES[kind], xlabel="block")
        panel.set_ylim(bottom=0)
    panels[0].set_ylabel("width")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
