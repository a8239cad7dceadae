"""The paper's ablations: a row an arm, means over seeds, points over ours with their interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean

from benchmarks.accuracy.ablation_arms import ARMS, OURS, difference
from docs.tables.base import Row, rows, table
from nvit.spec import KINDS

PAPER = {
    "": "",
    "alignment": "alignment (B.3)",
    "objective": "objective (B.1)",
    "saliency": "saliency (B.4)",
    "latency": "latency term (B.6)",
    "one shot": "one shot",
    "pace": "pace",
    "criterion": "criterion",
}


def _line(found: Sequence[Row], name: str, what: str) -> list[str]:
    mine = [r for r in found if r["arm"] == name]

    def average(key: str, digits: int) -> str:
        values = [float(r[key]) for r in mine if r[key]]
        return f"{mean(values):.{digits}f}" if values else "–"

    over = "–"
    if name != OURS and (d := difference(found, name)) is not None:
        over = f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})"
    kept = " ".join(average(f"kept_{kind}", 2) for kind in KINDS)
    ratios = [average("predicted_ratio", 2), f"{average('measured_ratio', 2)} ± {average('spread', 2)}"]
    tops = " ".join(f"{float(r['top1']):.1f}" for r in mine)
    return [what, name, average("pruning_steps", 0), *ratios, kept, tops, over]


def every() -> str:
    """All arms that were measured, one ablation after the other."""
    found, lines = rows("ablations_cpu"), []
    for arm in sorted(ARMS, key=lambda a: list(PAPER).index(a.table)):
        for name in arm.rows:
            if any(r["arm"] == name for r in found):
                lines.append(_line(found, name, PAPER[arm.table]))
    head = [
        "ablation",
        "differs from ours in",
        "steps of pruning",
        "latency by the table",
        "measured",
        "kept of EMB, H, QK, V, MLP",
        "top-1 by seed",
        "points over ours",
    ]
    return table(head, lines)


TABLES: dict[str, Callable[[], str]] = {"ablations": every}
