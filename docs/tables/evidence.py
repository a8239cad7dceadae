"""nvit beside its peers: settings of published neighbours, recipes of few epochs."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.engine.recipe_hours import hours
from docs.tables.base import RESULTS, Row, rows, table
from nvit.cli.flags.prune import PruneCommand
from nvit.cli.recipe import from_toml

MODERN = RESULTS.parents[1] / "recipes" / "modern"


def neighbours() -> str:
    """By setting, what is published and what we keep."""
    found = rows("neighbours_cpu")
    lines = []
    for setting in dict.fromkeys(r["setting"] for r in found):
        mine = [r for r in found if r["setting"] == setting]
        for r in sorted(mine, key=lambda r: r["published"] == "True"):
            quoted = r["published"] == "True"
            numbers = f"{float(r['dense']):.1f} → {float(r['top1']):.1f}"
            method = f"{r['method']} (quoted)" if quoted else f"**{r['method']}**"
            lines.append([setting, method, numbers, _kept(r)])
    return table(["what leaves", "method", "top-1, dense → pruned", "retention"], lines)


def _kept(row: Row) -> str:
    kept = f"{100 * float(row['retention']):.1f} %"
    if row["published"] == "True":
        return kept
    return f"{kept} ({100 * float(row['low']):.1f} to {100 * float(row['high']):.1f})"


def recipes() -> str:
    """What recipes/modern take."""
    lines = []
    for path in sorted(MODERN.glob("*.toml"), key=lambda p: (len(p.stem.rpartition("_")[2]), p.stem)):
        config = from_toml(PruneCommand, path).config
        found = hours(config)
        how = f"one shot, {config.images} images, refit (not timed on a GPU)"
        if config.train:
            how = f"while training, {found['epochs']:.1f} epochs"
        then = f"{config.finetune_epochs:g} epochs"
        total = f"{found['pruning'] + found['finetuning']:.1f}"
        lines.append([f"[{path.stem}](../recipes/modern/{path.name})", how, then, total])
    return table(["recipe", "pruning", "then distillation", "GPU hours"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "neighbours": neighbours,
    "recipes": recipes,
}
