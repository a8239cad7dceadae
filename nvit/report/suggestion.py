"""Which model of a run to take, in words, and how that is chosen."""

from __future__ import annotations

from dataclasses import dataclass

from .knee import knee
from .model import LOWER_IS_BETTER, Model, Run, unit

ALLOWED = 1.0
"""Points that a model may lose where no knee says which to take."""


@dataclass(frozen=True)
class Suggestion:
    """What to take.

    Attributes:
        model: None where there is nothing to choose.
        headline: a sentence about it.
        why: how it was chosen, and what to know before it is used.
        knee: the model at the knee of the curve; None where there is none.
    """

    model: Model | None
    headline: str
    why: str
    knee: Model | None = None


def knee_of(run: Run) -> Model | None:
    """The model at the knee of quality over latency; one that stands out by less than its standard error is none."""
    known = [m for m in run.models if m.ratio is not None and run.good(m) is not None]
    noise = max((m.row.get(f"{run.metric}_se", 0.0) for m in known), default=0.0)
    at = knee([(m.ratio, run.good(m)) for m in known], noise)
    return None if at is None else known[at]


def suggest(run: Run) -> Suggestion:
    """The model at the knee; without one the fastest that loses at most `ALLOWED` points (of a quality that is no
    percentage: 2 % of the dense one's), or else the one that loses least."""
    name = run.title or run.name
    if run.kind in ("finetune", "snapshot") or not run.pruned:
        return _alone(run, name)
    known = [m for m in run.pruned if m.ratio is not None]
    if not known:
        return Suggestion(None, f"{name}: no latency is known.", "Nothing can be suggested without one.")
    judged = [m for m in known if lost(run, m) is not None]
    if not judged:
        best = min(known, key=lambda m: m.ratio)
        why = f"{_first(best)} is the fastest. How accurate it is was not measured here: nvit evaluate says it."
        return Suggestion(best, _said(run, best, name), why)
    bend = knee_of(run)
    if bend is not None and not bend.dense:
        why = f"{_first(bend)} is at the knee of the curve: below it accuracy falls faster than time is saved."
        return Suggestion(bend, _said(run, bend, name), why + _beware(run, bend), bend)
    if len(run.pruned) == 1:
        why = "It is the only model of this run; nvit prune --sweep gives a curve to choose from."
        return Suggestion(judged[0], _said(run, judged[0], name), why + _beware(run, judged[0]))
    limit = _allowed(run)
    inside = [m for m in judged if lost(run, m) <= limit]
    if inside:
        best = min(inside, key=lambda m: m.ratio)
        why = f"The curve has no knee. {_first(best)} is the fastest model that loses at most {_amount(run, limit)}."
    else:
        best = min(judged, key=lambda m: lost(run, m))
        why = f"The curve has no knee, and every model loses more than {_amount(run, limit)}; {best.name} loses least."
    return Suggestion(best, _said(run, best, name), why + _beware(run, best))


def _first(model: Model) -> str:
    """A model's name as a sentence begins with it; a name that somebody gave stays as it is."""
    return model.name if model.target is None else model.name.capitalize()


def lost(run: Run, model: Model) -> float | None:
    """How much quality a model lost against the dense one; negative where it gained."""
    before, after = (None if m is None else run.good(m) for m in (run.dense, model))
    return None if before is None or after is None else before - after


def _allowed(run: Run) -> float:
    return ALLOWED if unit(run.metric)[1] == "points" else 0.02 * abs(run.good(run.dense))


def _amount(run: Run, value: float) -> str:
    """`1.2 points`, `0.013 of cosine`."""
    what = unit(run.metric)[1]
    number = f"{value:.1f}" if what == "points" else f"{value:.3g}"
    return f"{number} point" if what == "points" and number == "1.0" else f"{number} {what}"


def _said(run: Run, model: Model, name: str) -> str:
    """`deit_tiny runs 1.52 times as fast and loses 1.2 points of top-1.`"""
    faster = 1 / model.ratio if model.ratio else 0.0
    name = model.name if run.kind == "compare" else f"{name} {model.name}"
    begin = f"{name} {'runs' if model.measured else 'should run'} {faster:.2f} times as fast"
    if (fall := lost(run, model)) is None:
        return begin + "."
    metric = unit(run.metric)[0]
    worse = "rises by" if run.metric in LOWER_IS_BETTER else "loses"
    if fall <= 0:
        return f"{begin} and loses no {metric}."
    if run.metric in LOWER_IS_BETTER or unit(run.metric)[1] != "points":
        return f"{begin}; {metric} {'rises' if worse == 'rises by' else 'falls'} by {fall:.3g}."
    return f"{begin} and loses {_amount(run, fall)} of {metric}."


def _beware(run: Run, model: Model) -> str:
    fall, off = lost(run, model), model.row.get(f"{run.metric}_se")
    said = ""
    if not model.measured:
        said += " Its latency is predicted by the table and was not measured."
    if off and fall is not None and 0 < fall < off:
        said += f" The loss is within the standard error of the evaluation (± {_amount(run, off)})."
    elif fall is not None and fall > 5 * _allowed(run):
        said += " That is much: nvit finetune trains it further."
    return said


def _alone(run: Run, name: str) -> Suggestion:
    if not run.models:
        return Suggestion(None, f"{name}: nothing to show yet.", "The run has left no model so far.")
    last = run.models[-1]
    if last.dense:
        return Suggestion(None, f"{name}: no pruned model yet.", "There is nothing to choose from.")
    said = [f"{last.row['params'] / 1e6:.2f} M parameters"] if "params" in last.row else []
    if run.metric and run.metric in last.row:
        said.append(f"{unit(run.metric)[0]} {last.row[run.metric]:.4g}")
    if last.ratio is not None:
        said.append(f"{last.ratio:.3f} of the dense latency")
    return Suggestion(last, f"{name}: {', '.join(said) or 'one model'}.", "One model: there is nothing to choose from.")
