"""The figures of a page that are its own; widths are those of `nvit analyze widths`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..analysis.figure import panels, whole_numbers
from ..utils.style import ACCENT, INK, line
from .model import LOWER_IS_BETTER, Model, Run, unit
from .svg import as_text

HEIGHT = 3.1
"""Inches of a figure of one panel."""


def head(metric: str) -> str:
    """A quality as an axis has it."""
    name, what = unit(metric)
    return f"{name} %" if what == "points" else name + (", less is better" if metric in LOWER_IS_BETTER else "")


def curve(runs: Sequence[Run], knees: Mapping[str, Model | None], x: str, x_label: str):
    """Quality over latency, a line a run, dense models and knees marked.

    Args:
        x: `ratio` for the fraction of the dense latency, or `latency_ms`.
    """

    def cost(model: Model) -> float | None:
        return model.ratio if x == "ratio" else model.row.get(x)

    def draw(path: Path, pixels: int) -> None:
        with panels(1, path, pixels=pixels, height=HEIGHT) as (panel,):
            for i, run in enumerate(runs):
                known = [m for m in run.models if cost(m) is not None and run.good(m) is not None]
                known.sort(key=cost)
                across, up = [cost(m) for m in known], [m.row[run.metric] for m in known]
                off = [m.row.get(f"{run.metric}_se", 0.0) for m in known]
                wide = [m.row.get("measured_spread", 0.0) * (1 if x == "ratio" else _dense(run, x)) for m in known]
                name = as_text(run.name) if len(runs) > 1 else "pruned"
                panel.errorbar(across, up, yerr=off, xerr=wide, **line(i), elinewidth=0.9, label=name, zorder=3)
                dense = next((m for m in known if m.dense), None)
                if dense is not None:
                    at = (cost(dense), dense.row[run.metric])
                    label = "dense" if i == 0 else None
                    panel.axhline(at[1], color=INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
                    panel.plot(*at, "*", color=INK, markersize=11, label=label, zorder=4)
                bend = knees.get(run.name)
                if bend in known:
                    at = (cost(bend), bend.row[run.metric])
                    ring = {"markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.4}
                    panel.plot(*at, "o", markersize=14, **ring, label=None if i else "knee", zorder=5, linestyle="")
            panel.set(xlabel=x_label, ylabel=head(runs[0].metric))
            panel.margins(x=0.08, y=0.12)
            panel.legend(loc="upper left" if runs[0].metric in LOWER_IS_BETTER else "lower right")

    return draw


def _dense(run: Run, key: str) -> float:
    return run.dense.row.get(key, 0.0) if run.dense else 0.0


def foretold(run: Run):
    """Measured over predicted latency, as fractions of the dense one's; on the diagonal the table was right."""
    known = [m for m in run.models if "measured_ratio" in m.row and "predicted_ratio" in m.row]

    def draw(path: Path, pixels: int) -> None:
        with panels(1, path, pixels=pixels, height=HEIGHT) as (panel,):
            panel.axline((0, 0), slope=1, color=INK, linewidth=0.8, linestyle=(0, (2, 2)), label="as predicted")
            at = ([m.row["predicted_ratio"] for m in known], [m.row["measured_ratio"] for m in known])
            off = [m.row.get("measured_spread", 0.0) for m in known]
            panel.errorbar(*at, yerr=off, color=ACCENT, marker="o", linestyle="", label="measured, ± spread")
            panel.set(xlabel="predicted, of the dense latency", ylabel="measured, of the dense latency")
            panel.set(xlim=(0, 1.08), ylim=(0, 1.08))
            panel.legend(loc="upper left")

    return draw


def history(run: Run):
    """Predicted latency after every decision, measurements, and the targets."""

    def draw(path: Path, pixels: int) -> None:
        with panels(1, path, pixels=pixels, height=HEIGHT) as (panel,):
            steps = steps_of(run)
            panel.plot(steps, [r["predicted_ratio"] for r in run.history], color=ACCENT, label="predicted")
            seen = [(s, r) for s, r in zip(steps, run.history, strict=True) if "measured_ratio" in r]
            if seen:
                up, off = [r["measured_ratio"] for _, r in seen], [r.get("measured_spread", 0.0) for _, r in seen]
                panel.errorbar([s for s, _ in seen], up, yerr=off, **line(4) | {"linestyle": ""}, label="measured")
            for i, m in enumerate(m for m in run.pruned if m.target is not None):
                label = "target" if i == 0 else None
                panel.axhline(m.target, color=INK, linewidth=0.7, linestyle=(0, (2, 2)), label=label, zorder=1)
            panel.set(xlabel=over(run), ylabel="of the dense latency", ylim=(0, 1.08))
            whole_numbers(panel.xaxis)
            panel.legend(loc="lower left")

    return draw


def steps_of(run: Run) -> list[float]:
    """Training steps at which decisions were taken, or their number where nothing was trained."""
    steps = [r.get("step", 0.0) for r in run.history]
    return steps if len(set(steps)) == len(steps) else [float(i + 1) for i in range(len(steps))]


def over(run: Run) -> str:
    """What `steps_of` counts."""
    steps = {r.get("step", 0.0) for r in run.history}
    return "training step" if len(steps) == len(run.history) and len(steps) > 1 else "decision"
