"""`nvit analyze widths`: the paper's Fig. 4 for any snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..analysis import rule, widths
from ..structure import snapshot
from ..structure.skeleton import dense_blocks, tokens_by_block
from ..utils.report import show, write_csv, write_result
from .flags.widths import WidthsCommand
from .models import snapshots_of


def run_widths(names: Sequence[str], command: WidthsCommand) -> dict[str, Any]:
    """What goes into result.json."""
    specs = {name: snapshot.load_spec(name) for name in snapshots_of(names, command.target)}
    models = {name: spec.blocks for name, spec in specs.items()}
    dense = {dense_blocks(spec) for spec in specs.values()}
    tokens = {name: tokens_by_block(spec) for name, spec in specs.items()}
    rows = widths.width_rows(models, tokens)
    out = Path(command.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "widths.csv", rows)
    widths.plot_widths(models, out / "widths.png", dense.pop() if len(dense) == 1 else None, tokens=tokens)
    alike = len({len(blocks) for blocks in models.values()}) == 1
    told = alike and len({b.emb for blocks in models.values() for b in blocks}) > 1
    slopes = rule.slopes(models) if told else []
    if slopes:
        write_csv(out / "slopes.csv", slopes)
    result = {"widths": rows, "slopes": slopes, "csv": str(out / "widths.csv"), "figure": str(out / "widths.png")}
    write_result(out, result)
    return result


def run(command: WidthsCommand) -> None:
    found = run_widths(command.models, command)
    show("widths over all blocks: the same everywhere, or smallest to largest", widths.spans(found["widths"]))
    print(f"{found['csv']}\n{found['figure']}")
    if found["slopes"]:
        print(f"{command.out}/slopes.csv: heads, QK and MLP against EMB, block by block")
