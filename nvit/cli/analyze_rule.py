"""`nvit analyze rule`: the paper's Sec. 5.4 with one's own pruned models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..analysis import rule, widths
from ..structure import snapshot
from ..utils.report import write_csv, write_result
from .flags.rule import RuleCommand
from .models import snapshots_of


def run_rule(names: Sequence[str], command: RuleCommand) -> dict[str, Any]:
    """What goes into result.json."""
    models = {name: snapshot.load_spec(name).blocks for name in snapshots_of(names, command.target)}
    found, explained = rule.fit(list(models.values()))
    by_rule = {f"rule at {emb}": found.widths(emb, found.of) for emb in sorted({b[0].emb for b in models.values()})}
    out = Path(command.out)
    out.mkdir(parents=True, exist_ok=True)
    found.save(out / "rule.json")
    write_csv(out / "rule.csv", widths.width_rows(models | by_rule))
    widths.plot_widths(models | by_rule, out / "rule.png")
    result = {
        "rule": asdict(found),
        "r2": explained,
        "models": list(models),
        "json": str(out / "rule.json"),
        "csv": str(out / "rule.csv"),
        "figure": str(out / "rule.png"),
    }
    write_result(out, result)
    return result


def run(command: RuleCommand) -> None:
    found = run_rule(command.models, command)
    fitted = rule.Rule(**found["rule"])
    print(rule.in_words(fitted))
    print("R² of widths over emb: " + ", ".join(f"{kind} {r2:.2f}" for kind, r2 in found["r2"].items()))
    if worse := [kind for kind, r2 in found["r2"].items() if r2 < 0]:
        print(f"below 0: a mean over the blocks fits {' and '.join(worse)} better than the rule that fits all together")
    print(f"{found['csv']}\n{found['figure']}")
    print(f"a model of it: nvit.zoo.revit(nvit.zoo.Rule.load({found['json']!r}).widths(emb=192))")
