"""The figures of pages that no benchmark draws itself."""

from __future__ import annotations

from pathlib import Path

from docs.tables.base import rows
from docs.tables.saliency import CRITERIA, SHOWN, stage
from nvit.analysis.correlation import plot
from nvit.analysis.figure import PIXELS, panels
from nvit.config import PruneConfig
from nvit.criteria.registry import CRITERIA as PUBLIC
from nvit.spec import TITLES
from nvit.utils.style import ACCENT, BEHIND, INK

CORRELATION_IMAGES = 200
"""That docs/saliency.md says the correlation was measured on."""


def saliency(path: Path, pixels: int = PIXELS) -> None:
    """A panel per kind: KL to the dense model by criterion, of the screening those that users can choose; what
    `nvit prune --no-train` takes by itself in a colour."""
    gates = [r for r in stage("screen") if r["gate"] in ("leave", "tokens")]
    screened = [(r, SHOWN.get(r["saliency"], r["saliency"])) for r in gates]
    public = [(r, name) for r, name in screened if name in PUBLIC]
    kinds, default = list(dict.fromkeys(r["structure"] for r, _ in public)), PruneConfig(train=False).saliency
    with panels(len(kinds), path, pixels=pixels, height=1.7, width=2.3) as axes:
        for panel, kind in zip(axes, kinds, strict=True):
            mine = {name: float(r["kl_choose"]) for r, name in public if r["structure"] == kind}
            share = next(float(r["fraction"]) for r, _ in public if r["structure"] == kind)
            bars = panel.barh(list(mine), list(mine.values()), color=[ACCENT if n == default else BEHIND for n in mine])
            panel.bar_label(bars, fmt="%#.2g", padding=2, fontsize=7.5, color=INK)
            panel.invert_yaxis()
            panel.margins(x=0.2)
            panel.grid(axis="y", visible=False)
            what = f"all kinds, {share:g} of latency" if kind == "all" else f"{TITLES[kind]}, {100 * share:g} % gone"
            panel.set(title=what, xlabel="KL to the dense model")


def correlation(path: Path, pixels: int = PIXELS) -> None:
    """Loss change over saliency, a panel per criterion of the page's table."""
    found = rows("correlation_cpu")
    numbers = [{k: float(v) if k in (*CRITERIA, "loss_change") else v for k, v in r.items()} for r in found]
    plot(numbers, CRITERIA, path, CORRELATION_IMAGES, pixels)
