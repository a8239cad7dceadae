"""nvit beside its peers: settings of published neighbours, recipes of few epochs."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.engine.recipe_hours import hours
from docs.tables.base import RESULTS, Row, gain, rows, table
from nvit.cli.flags.prune import PruneCommand
from nvit.cli.recipe import from_toml

MODERN = RESULTS.parents[1] / "recipes" / "modern"


def curve() -> str:
    """Top-1 at each target after equal training, best first, and before it."""
    found = rows("curve_cpu")
    targets = sorted({r["target"] for r in found}, key=float, reverse=True)
    lines = []
    for target in targets:
        mine = sorted((r for r in found if r["target"] == target), key=lambda r: -float(r["top1"]))
        for r in mine:
            ours = r["method"].startswith("nvit")
            ahead = gain(r, "ahead", "ahead_low", "ahead_high") if r.get("ahead") else ""
            name = f"**{r['method']}**" if ours else r["method"]
            before = f"{float(r['untrained']):.1f}" if r["untrained"] else ""
            ratio = f"{float(r['measured_ratio']):.3f}" if r["measured_ratio"] else "1"
            macs = f"{float(r['macs']) / float(found[0]['macs']):.2f}"
            lines.append([f"{float(target):g}", name, ratio, macs, before, f"{float(r['top1']):.1f}", ahead])
    head = ["target", "method", "measured latency", "MACs", "before training", "top-1", "ahead of the best peer"]
    return table(head, lines)


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
    "curve": curve,
    "neighbours": neighbours,
    "recipes": recipes,
}
