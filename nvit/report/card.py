"""The top of a page: what to take of a run, and the few numbers that say why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..utils.report import FORMATS
from .model import PERCENT, Model, Run, unit
from .suggestion import lost, suggest


@dataclass(frozen=True)
class Tile:
    """A number of the suggested model, and what the dense one has."""

    name: str
    value: str
    was: str


@dataclass(frozen=True)
class Card:
    """What a page begins with, for each run."""

    name: str
    headline: str
    why: str
    tiles: Sequence[Tile]
    load: str
    absent: Sequence[str]


def card(run: Run, folder: str) -> Card:
    """The card of a run in a folder."""
    found = suggest(run)
    tiles = () if found.model is None else tuple(_tiles(run, found.model))
    load = ""
    if found.model is not None and run.kind == "prune" and found.model.target is not None:
        load = f"nvit.load({f'{folder}/target-{found.model.target:g}'!r})"
    return Card(run.name, found.headline, found.why, tiles, load, run.absent)


def _tiles(run: Run, model: Model):
    dense = run.dense or Model("", {})
    if model.ratio and run.dense:
        how = "measured" if model.measured else "predicted"
        yield Tile("Speed", f"{1 / model.ratio:.2f} ×", f"{how}, against dense")
    if (rate := model.row.get("images_per_s")) is not None:
        yield Tile("Images a second", f"{rate:,.0f}", _was(dense.row.get("images_per_s"), "{:,.0f}"))
    if run.metric and run.metric in model.row:
        name = unit(run.metric)[0]
        say, percent = FORMATS.get(run.metric, ("", "{:.4g}".format))[1], run.metric in PERCENT
        value = f"{model.row[run.metric]:.1f} %" if percent else say(model.row[run.metric])
        was = "" if lost(run, model) is None else f"dense {dense.row[run.metric]:.1f} %"
        if was and not percent:
            was = f"dense {say(dense.row[run.metric])}"
        yield Tile(name[0].upper() + name[1:], value, was)
    if (params := model.row.get("params")) is not None:
        was = dense.row.get("params")
        size = f"{4 * params / 1e6:,.1f} MB in float32"
        yield Tile("Parameters", f"{params / 1e6:.2f} M", f"dense {was / 1e6:.2f} M; {size}" if was else size)


def _was(value: float | None, form: str) -> str:
    return "" if value is None else f"dense {form.format(value)}"
