"""The figures of pages that no benchmark draws itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from docs.tables.analyze import DENSE, prediction
from docs.tables.base import Row, rows
from docs.tables.saliency import CRITERIA, SHOWN, stage
from nvit.analysis import diversity
from nvit.analysis import prediction as random_widths
from nvit.analysis import sensitivity as traces
from nvit.analysis.correlation import plot
from nvit.analysis.figure import PIXELS, panels
from nvit.analysis.widths import plot_widths
from nvit.config import PruneConfig
from nvit.criteria.registry import CRITERIA as PUBLIC
from nvit.spec import KINDS, TITLES, BlockWidths
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


def _numbers(row: Row, *keys: str) -> dict[str, Any]:
    """A row with some of its keys as numbers, None where they are empty."""
    return row | {key: float(row[key]) if row[key] else None for key in keys} | {"block": int(row["block"])}


def sensitivity(path: Path, pixels: int = PIXELS) -> None:
    """Traces by block, from batches of 16."""
    found = [r for r in rows("analyses_sensitivity_cpu") if r["block"] != "all" and r["batch"] == "16"]
    keys = [f"{key}{end}" for key in traces.MEASURES for end in ("", "_se")]
    traces.plot([_numbers(r, *keys) for r in found], path, int(found[0]["images"]), pixels)


def attention(path: Path, pixels: int = PIXELS) -> None:
    found = rows("analyses_attention_cpu")
    by_model: dict[str, list[dict[str, Any]]] = {}
    for r in found:
        by_model.setdefault(r["model"], []).append(_numbers(r, *diversity.MEASURES))
    diversity.plot(by_model, path, int(found[0]["images"]), pixels)


def widths(path: Path, pixels: int = PIXELS) -> None:
    """Of the run that was refitted and trained, with the dense model behind."""
    by_model: dict[str, list[BlockWidths]] = {}
    for r in rows("analyses_widths_cpu"):
        if r["run"] == "pruned":
            by_model.setdefault(r["model"], []).append(BlockWidths(*(int(r[kind]) for kind in KINDS)))
    plot_widths(by_model, path, [BlockWidths(192, *DENSE.values())] * 12, pixels)


def latency_error(path: Path, pixels: int = PIXELS) -> None:
    random_widths.plot(prediction("20"), path, pixels)


FIGURES: dict[str, Callable[..., None]] = {
    "saliency.png": saliency,
    "correlation.png": correlation,
    "sensitivity.png": sensitivity,
    "attention.png": attention,
    "widths.png": widths,
    "latency_error.png": latency_error,
}
"""By file in docs/, what draws it."""
