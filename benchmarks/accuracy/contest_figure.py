"""The figure of a contest: accuracy against measured latency, a line a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.contest import OURS, PEERS
from nvit.analysis.accuracy_curve import Against, plot_accuracy
from nvit.analysis.figure import PIXELS

AGAINST = (Against("measured_ratio", "measured share of dense latency"),)


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str, pixels: int = PIXELS) -> None:
    """Top-1 after equal training; the dense model belongs to all lines."""
    dense = next(r for r in rows if r["method"] == "dense")
    images, top = int(dense["evaluated"]), float(dense["top1"])
    lines: dict[str, list[dict[str, Any]]] = {}
    for method in (*OURS, *PEERS):
        mine = [r for r in rows if r["method"] == method and not r.get("failed")]
        if not mine:
            continue
        points = [{key: float(r[key]) for key in ("measured_ratio", "top1")} for r in mine]
        lines[method] = [{"measured_ratio": 1.0, "top1": top}, *points]
    plot_accuracy(lines, AGAINST, path, images=images, title=title, pixels=pixels)
