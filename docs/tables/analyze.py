"""What the commands of `nvit analyze` find on real DeiT-Ti."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean

from docs.tables.base import Row, rows, table
from nvit.analysis.prediction import errors
from nvit.analysis.sensitivity import MEASURES
from nvit.spec import TITLES

DENSE = {"heads": 3, "qk_dim": 64, "v_dim": 64, "mlp": 768}
"""Widths of a block of DeiT-Ti."""
THIRDS = {"first 3": range(3), "middle 6": range(3, 9), "last 3": range(9, 12)}
"""Blocks by where they are: the paper's rule doubles the middle six."""
PAPER = {
    "Q": ("1.4e-6", "0.17"),
    "K": ("1.6e-6", "0.17"),
    "V": ("6.5e-6", "0.14"),
    "proj": ("6.4e-6", "0.14"),
    "FC1": ("6.1e-6", "0.012"),
    "FC2": ("4.6e-6", "0.012"),
}
"""Its Tab. 5, of DeiT-B: mean Hessian trace, and milliseconds a unit on a V100 at batch 576."""
RUNS = {
    "pruned": "`remaining`, refit, three epochs",
    "fisher": "`fisher`, one shot",
}
"""By `run` of the CSVs, how its snapshots were pruned."""


def over_all(structure: str, batch: str) -> Row:
    """A structure over all blocks, from batches of so many images."""
    found = rows("analyses_sensitivity_cpu")
    return next(r for r in found if (r["structure"], r["block"], r["batch"]) == (structure, "all", batch))


def sensitivity() -> str:
    lines = []
    for name, (trace, ms) in PAPER.items():
        both = [over_all(name, batch) for batch in ("16", "4")]
        cells = [f"{1e4 * float(r[k]):.1f} ± {1e4 * float(r[f'{k}_se']):.1f}" for k in MEASURES for r in both]
        lines.append([name, *cells, f"{1e3 * float(both[0]['latency_per_unit']):.2f}", trace, ms])
    named = [f"{name}, 1e-4: batches of 16" for name in MEASURES.values()]
    head = ["structure", named[0], "of 4", named[1], "of 4", "a unit, ‰ of dense latency (counted)"]
    return table([*head, "*quoted, DeiT-B:* Hessian", "*ms a unit*"], lines)


def attention() -> str:
    """Blocks 1, the most diverse one, and 12 of every model."""
    lines = []
    for name in dict.fromkeys(r["model"] for r in rows("analyses_attention_cpu")):
        mine = [r for r in rows("analyses_attention_cpu") if r["model"] == name]
        cells = []
        for key in ("map_distance", "output_distance"):
            by_block = [float(r[key]) if r[key] else math.nan for r in mine]
            top = max(range(len(by_block)), key=lambda i: -1.0 if math.isnan(by_block[i]) else by_block[i])
            ends = [f"{by_block[i]:.2f}" for i in (0, -1)]
            cells += [ends[0], f"{by_block[top]:.2f} (block {top + 1})", ends[1]]
        lines.append([name, *cells])
    head = ["model", "maps: block 1", "most", "block 12", "outputs, 1 - CKA: block 1", "most", "block 12"]
    return table(head, lines)


def thirds(mine: Sequence[Row], kind: str) -> list[float]:
    """Mean share of a width that is left in each of `THIRDS`."""
    return [mean(int(r[kind]) for r in mine if int(r["block"]) in part) / DENSE[kind] for part in THIRDS.values()]


def widths() -> str:
    found, lines = rows("analyses_widths_cpu"), []
    for run, model in dict.fromkeys((r["run"], r["model"]) for r in found):
        mine = [r for r in found if (r["run"], r["model"]) == (run, model)]
        parts = ["{:.2f} {:.2f} {:.2f}".format(*thirds(mine, kind)) for kind in DENSE]
        lines.append([RUNS[run], model.split("target-")[1], mine[0]["emb"], *parts])
    return table(["saliency", "latency", "EMB", *(TITLES[kind] for kind in DENSE)], lines)


def rule() -> str:
    lines = []
    for r in rows("analyses_rule_cpu"):
        scaled = [f"{float(r[k]):.3g} ({float(r[f'{k}_r2']):.2f})" for k in ("heads", "qk_dim", "mlp")]
        lines.append([RUNS[r["run"]], *scaled, r["v_dim"], f"{float(r['factor']):.2f} in {r['first']}–{r['last']}"])
    lines.append(["*quoted:* ReViT", "0.01", "0.05", "3", "64", "2 in 4–9"])
    head = ["saliency", "heads / EMB (R²)", "QK / EMB (R²)", "MLP / EMB (R²)", "V", "times, in blocks"]
    return table(head, lines)


def prediction(table_seconds: str) -> list[dict[str, float]]:
    """Rows of random widths as numbers, of one table."""
    keys = ("predicted_ratio", "measured_ratio", "measured_spread", "error")
    found = [r for r in rows("analyses_latency_cpu") if r["table_seconds"] == table_seconds]
    return [{k: float(r[k]) for k in keys} | {"batch": int(r["batch"])} for r in found]


def latency() -> str:
    lines = []
    for seconds in ("20", "6"):
        mine = prediction(seconds)
        found, ratios = errors(mine), [r["measured_ratio"] for r in mine]
        line = [f"{seconds} s, {mine[0]['batch']} images a batch", str(len(mine))]
        line += [f"{min(ratios):.2f} – {max(ratios):.2f}"]
        lines.append(line + [f"{found[key]:.1f}" for key in ("median", "largest")] + [f"{found['mean']:+.1f}"])
    return table(["table", "models", "measured, of dense", "median error, %", "largest", "mean"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "sensitivity": sensitivity,
    "attention": attention,
    "widths": widths,
    "rule": rule,
    "latency": latency,
}
