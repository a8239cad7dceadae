"""The figure of a kernel's benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.harness import Row


def figure(rows: Sequence[Row], op: str, path: Path, ours: str) -> None:
    """Median ms a provider, one panel a case, with bars from the 20th to the 80th percentile; `ours` in a colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = [r for r in rows if r.median_ms is not None and not r.case.startswith("ceiling")]
    names = list(dict.fromkeys(r.case for r in timed))
    if not names:
        return
    height = [1 + 0.3 * sum(r.case == n for r in timed) for n in names]
    fig, axes = plt.subplots(len(names), 1, figsize=(8, sum(height)), height_ratios=height, squeeze=False)
    for ax, name in zip(axes[:, 0], names, strict=True):
        mine = [r for r in timed if r.case == name]
        below = [max(0.0, r.median_ms - r.p20_ms) for r in mine]
        above = [max(0.0, r.p80_ms - r.median_ms) for r in mine]
        colors = ["tab:orange" if r.provider.startswith(ours) else "tab:gray" for r in mine]
        ax.barh([r.provider for r in mine], [r.median_ms for r in mine], xerr=[below, above], color=colors)
        ax.invert_yaxis()
        ax.set_title(name, fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("ms")
    fig.suptitle(f"{op} · {rows[0].device}", fontsize=9)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
