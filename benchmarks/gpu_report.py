"""The table at the end of `benchmarks.gpu`: what became of each stage, and its rows beside their best peer."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness import OURS

Row = dict[str, str]
KERNELS = ("attention", "kept_layer_norm", "mlp", "merge_tokens", "group_dot")


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, or nothing without lines."""
    lines = list(lines)
    if not lines:
        return ""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)) + "\n\n"


def rows(out: Path, ending: str, since: float) -> list[Row]:
    """Rows of the CSVs with this ending that were written since then."""
    found: list[Row] = []
    for path in sorted(out.glob(f"*_{ending}.csv")):
        if path.stat().st_mtime >= since:
            with path.open(newline="") as file:
                found += csv.DictReader(file)
    return found


def number(text: str | None, factor: float = 1.0, digits: int = 3) -> str:
    """A cell of a CSV to so many significant digits, without an exponent; a dash for none."""
    if not text:
        return "–"
    value = float(text) * factor
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def best(found: Sequence[Row]) -> Row | None:
    """The row of the least device time."""
    timed = [r for r in found if r["median_ms"]]
    return min(timed, key=lambda r: float(r["median_ms"])) if timed else None


def kernel_lines(found: Sequence[Row]) -> list[list[str]]:
    """A line per case: our fastest and the fastest peer, device and host µs."""
    lines = []
    for case in dict.fromkeys(r["case"] for r in found):
        mine = [r for r in found if r["case"] == case]
        pair = [best([r for r in mine if r["provider"].startswith(OURS) == ours]) for ours in (True, False)]
        cells = [case]
        for row in pair:
            times = [number(row["median_ms"], 1e3), number(row.get("host_ms"), 1e3)] if row else ["–", "–"]
            cells += [row["provider"] if row else "–", *times]
        faster = f"{float(pair[1]['median_ms']) / float(pair[0]['median_ms']):.2f}" if all(pair) else "–"
        lines.append([*cells, faster])
    return lines


def merge_lines(found: Sequence[Row]) -> list[list[str]]:
    """A line per merge of tokens whose block was timed: its µs and the block's, and the one as % of the other."""
    blocks = {r["case"].removeprefix("block of "): r for r in found if r["case"].startswith("block of ")}
    lines = []
    for row in found:
        its = next((b for label, b in blocks.items() if row["case"].endswith(f" {label}")), None)
        if row["provider"] != OURS or "backward" in row["case"] or not (its and its["median_ms"] and row["median_ms"]):
            continue
        times = [float(r["median_ms"]) for r in (row, its)]
        lines.append([row["case"], *(number(str(t), 1e3) for t in times), f"{100 * times[0] / times[1]:.1f}"])
    return lines


def chosen(found: Sequence[Row], columns: Sequence[str]) -> list[list[str]]:
    """These columns of every row, numbers to three digits."""

    def cell(text: str | None) -> str:
        try:
            return number(text)
        except ValueError:
            return text or "–"

    return [[cell(row.get(column)) for column in columns] for row in found]


def report(outcomes: Sequence, out: Path, since: float) -> str:
    """Everything in Markdown: stages, kernels, and the rows of each other CSV written since then."""
    text = table(["stage", "", "s", ""], ([o.name, o.state, f"{o.seconds:.0f}", o.note] for o in outcomes))
    kernels = [r for op in KERNELS for r in rows(out, op, since)]
    head = ["case", "ours", "µs", "host µs", "best peer", "µs", "host µs", "peer / ours"]
    text += table(head, kernel_lines(kernels))
    text += table(["merge", "µs", "block, µs", "% of its block"], merge_lines(rows(out, "merge_tokens", since)))
    others = {
        "training_step": ("case", "kernels", "ms", "device_ms", "host_ms", "images_per_s", "peak_mib", "note"),
        "pruning_loop": ("case", "ratio", "images_per_s", "settled_images_per_s", "times_timm", "note"),
        "pruned_deit": ("case", "parameters", "measured_ms", "images_per_s", "speed_up", "predicted_ratio",
                        "measured_ratio", "ratio_error", "table_s", "note"),
        "merged_deit": ("case", "macs", "merged_a_block", "measured_ms", "plain_ms", "images_per_s", "ratio",
                        "predicted_ratio", "ratio_error", "note"),
        "sparse24": ("case", "provider", "median_ms", "host_ms", "times_peer", "gbps"),
    }  # fmt: skip
    for name, columns in others.items():
        text += table(columns, chosen(rows(out, name, since), columns))
    return text
