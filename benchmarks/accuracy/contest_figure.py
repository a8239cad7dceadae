"""The figure of a contest: accuracy against measured latency, a line a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.contest import OURS, PEERS
from nvit.analysis.accuracy_curve import Against, plot_accuracy
from nvit.analysis.figure import PIXELS

AGAINST = (
    Against("measured_ratio", "measured share of dense latency", "trained equally"),
    Against("at", "measured share of dense latency", "before training", "untrained"),
)


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str, pixels: int = PIXELS) -> None:
    """Top-1 after equal training, and before it; the dense model belongs to all lines."""
    dense = next(r for r in rows if r["method"] == "dense")
    images, top = int(dense["evaluated"]), float(dense["top1"])
    lines: dict[str, list[dict[str, Any]]] = {}
    for method in (*OURS, *PEERS):
        mine = [r for r in rows if r["method"] == method]
        if not mine:
            continue
        lines[method] = [{"measured_ratio": 1.0, "top1": top}, {"at": 1.0, "top1": top}]
        for r in mine:
            ratio = float(r["measured_ratio"])
            lines[method].append({"measured_ratio": ratio, "top1": float(r["top1"])})
            lines[method].append({"at": ratio, "top1": float(r["untrained"])})
    plot_accuracy(lines, AGAINST, path, images=images, title=title, pixels=pixels)
