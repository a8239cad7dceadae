"""Sections in their order; each is a function of runs that gives nothing where there is nothing to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..analysis.widths import merging, plot_widths
from ..spec import KINDS, TITLES
from ..utils.report import FORMATS, OFF, in_time
from . import figures
from .model import PERCENT, Model, Run, unit
from .section import Rows, Section, figure
from .settings import environment, recipe
from .suggestion import knee_of, lost, suggest
from .svg import as_text

COLUMNS = ("latency_ms", "images_per_s", "params", "macs", "peak_memory")


def sections(runs: Sequence[Run], defaults: Mapping[str, Any]) -> list[Section]:
    """Those of a page; `defaults` are a recipe's, by name."""
    found = [gain(runs), *_of_each("Widths that are left", widths, runs)]
    found += [*_of_each("Predicted against measured", foretold, runs), *_of_each("How it went", history, runs)]
    found += [*_of_each("Recipe", lambda run: recipe(run, defaults), runs), *_of_each("Environment", environment, runs)]
    return found


def _of_each(title: str, make: Callable[[Run], Section | None], runs: Sequence[Run]) -> list[Section]:
    """A section of one run, or of several with a part for each; none where no run has anything for it."""
    made = [(run, part) for run in runs if (part := make(run)) is not None]
    if not made:
        return []
    if len(runs) == 1:
        return [made[0][1]]
    parts = [Section(run.name, part.lead, part.figures, part.tables) for run, part in made]
    return [Section(title, under=tuple(parts))]


def gain(runs: Sequence[Run]) -> Section:
    """Quality over latency, and every number of every model."""
    judged = [r for r in runs if r.metric and sum(r.good(m) is not None and m.ratio is not None for m in r.models) > 1]
    judged = [r for r in judged if r.metric == judged[0].metric]
    shown = []
    if judged:
        knees = {r.name: knee_of(r) for r in judged}
        same = len({tuple(sorted(map(str, r.setting.items()))) for r in judged}) == 1
        every = all("latency_ms" in m.row for r in judged for m in r.models if r.good(m) is not None)
        x = "latency_ms" if same and every and len(judged) > 1 else "ratio"
        measured = all(m.measured for r in judged for m in r.models)
        label = "latency, as a fraction of dense" + ("" if measured else " (or predicted)")
        if x == "latency_ms":
            label = f"ms, {judged[0].setting.get('latency_batch', '?')} images a batch"
        metric = unit(judged[0].metric)[0]
        points = "; ".join(_point(r, m) for r in judged for m in r.models if r.good(m) is not None)
        said = "Bars: one standard error, and how far a measured latency may be off."
        if any(knees.values()):
            said += " The ring is the knee: the point farthest above the straight line between the curve's ends."
        alt = f"{metric} over latency. {points}."
        shown.append(figure(said, alt, figures.curve(judged, knees, x, as_text(label, 60))))
    return Section("What it costs and gives", figures=shown, tables=[_numbers(run, len(runs) > 1) for run in runs])


def _point(run: Run, model: Model) -> str:
    ratio = "" if model.ratio is None else f" at {model.ratio:.2f} of the dense latency"
    return f"{model.name}: {model.row[run.metric]:.4g}{ratio}"


def _numbers(run: Run, several: bool) -> Rows:
    """Every model of a run in a table."""
    keys = [k for k in COLUMNS if any(k in m.row for m in run.models)]
    best = suggest(run).model
    heads, rows = ["model"], []
    if any(m.ratio for m in run.pruned) and run.dense:
        heads.append("times as fast")
    if run.metric:
        heads += [FORMATS.get(run.metric, (run.metric,))[0]] + (["change"] if run.dense else [])
    for m in run.models:
        row = [m.name]
        if "times as fast" in heads:
            row.append(f"{1 / m.ratio:.2f} ×" if m.ratio else "–")
        if run.metric:
            row.append(cell(m, run.metric))
            if run.dense:
                fall = lost(run, m)
                change = None if fall is None or m.dense else m.row[run.metric] - run.dense.row[run.metric]
                row.append("–" if change is None else _signed(change, 1 if run.metric in PERCENT else 4))
        rows.append([*row, *(cell(m, k) for k in keys)])
    heads += [FORMATS[k][0] for k in keys]
    marked = run.models.index(best) if best in run.models and len(run.pruned) > 1 else None
    where = ", ".join(f"{k.removeprefix('latency_')} {v}" for k, v in run.setting.items())
    caption = (f"{run.name}: " if several else "") + "every model" + (f" ({where})" if where else "")
    return Rows(caption, heads, rows, marked)


def _signed(value: float, digits: int) -> str:
    """`+1.2`, `−0.3`, and 0.0 without a sign."""
    return f"{value:+.{digits}f}".replace("-", "−") if round(value, digits) else f"{0:.{digits}f}"


def cell(model: Model, key: str) -> str:
    """A value as tables of the commands have it, with how far it may be off."""
    if key not in model.row:
        return "–"
    say = FORMATS.get(key, (key, lambda v: f"{v:.4g}"))[1]
    off = model.row.get(OFF.get(key, f"{key}_se"))
    return say(model.row[key]) + (f" ± {say(off)}" if off else "")


def widths(run: Run) -> Section | None:
    """What is left of every width, block by block (the paper's Fig. 4)."""
    shown_as = {as_text(m.name).replace("/", " "): m for m in run.pruned if m.widths}
    known, tokens = ({name: getattr(m, kind) for name, m in shown_as.items()} for kind in ("widths", "tokens"))
    if not known:
        return None
    dense = run.dense_widths or None
    if dense and any(len(blocks) != len(dense) for blocks in known.values()):
        dense = None
    best = suggest(run).model
    last = best if best is not None and best.widths else next(m for m in reversed(run.pruned) if m.widths)
    alt = f"Widths of every block of {', '.join(known)}. {last.name} keeps " + "; ".join(
        f"{TITLES[k]} {' '.join(str(getattr(b, k)) for b in last.widths)}" for k in KINDS
    )
    heads, rows = [TITLES[k] for k in KINDS], [[str(getattr(b, k)) for k in KINDS] for b in last.widths]
    lead = ["EMB is the width of the stream, MLP that of a hidden layer, QK and V are per head."]
    if merging({last.name: last.tokens}):
        heads, rows = [*heads, "tokens"], [[*row, str(n)] for row, n in zip(rows, last.tokens[1:], strict=True)]
        alt += f"; tokens behind each block {' '.join(map(str, last.tokens[1:]))}, of {last.tokens[0]}"
        lead.append(f"Alike tokens merge in every block: {last.tokens[-1]} of {last.tokens[0]} leave the last one.")
    shown = figure(
        "A panel a width, a line a model" + ("; bars behind: the dense model." if dense else "."),
        alt,
        lambda path, pixels: plot_widths(known, path, dense, pixels, tokens),
    )
    numbered = [[str(i + 1), *row] for i, row in enumerate(rows)]
    table = Rows(f"widths of {last.name}", ["block", *heads], numbered, folded=True)
    return Section("Widths that are left", lead, [shown], [table])


def foretold(run: Run) -> Section | None:
    """How well the latency table foretold what was measured."""
    known = [m for m in run.pruned if "measured_ratio" in m.row and m.row.get("predicted_ratio")]
    if not known:
        return None
    off = {m.name: m.row["measured_ratio"] / m.row["predicted_ratio"] - 1 for m in known}
    worst = max(off, key=lambda n: abs(off[n]))
    lead = f"The table of latencies was off by {abs(off[worst]):.1%} at most ({worst})."
    alt = "Measured over predicted latency: " + "; ".join(
        f"{m.name}: predicted {m.row['predicted_ratio']:.3f}, measured {m.row['measured_ratio']:.3f}" for m in known
    )
    shown = figure("On the dotted line the prediction was right.", alt, figures.foretold(run))
    heads = ["model", "predicted ×", "measured ×", "off by"]
    rows = [[m.name, cell(m, "predicted_ratio"), cell(m, "measured_ratio"), f"{off[m.name]:+.1%}"] for m in known]
    return Section("Predicted against measured", [lead], [shown], [Rows("fractions of the dense latency", heads, rows)])


def history(run: Run) -> Section | None:
    """Latency over decisions."""
    if not run.history:
        return None
    took = "" if run.seconds is None else f" The run took {in_time(run.seconds)}."
    count = len(run.history)
    first, last = (run.history[i]["predicted_ratio"] for i in (0, -1))
    lead = f"{count} decision{'s' * (count > 1)} brought the predicted latency to {last:.3f} of the dense one's."
    alt = f"Predicted latency over {figures.over(run)}s, from {first:.3f} to {last:.3f} of the "
    alt += "dense model's, with measurements where there were any."
    shown = figure("A decision removes the units that matter least for what they cost.", alt, figures.history(run))
    return Section("How it went", [lead + took], [shown])
