"""What tokens that merge cost, alone and with pruned widths."""

from __future__ import annotations

from collections.abc import Callable

from docs.tables.base import rows, table

METHODS = {"joint": "widths and tokens", "ToMe": "as many tokens in every block", "widths": "widths alone"}


def accuracy() -> str:
    """Points of top-1 lost at shares of the multiply-accumulates, with 95 % intervals, of all images and of half."""
    lines = []
    for r in rows("tokens_cpu"):
        if r["of"] == "macs":
            lost = "{:.1f} ({:.1f} to {:.1f})".format(*(float(r[k]) for k in ("lost", "lost_low", "lost_high")))
            widths = f"{float(r['widths_ratio']):.2f}" if r["widths_ratio"] else "–"
            shares = [f"{float(r['macs']):.2f}", f"{float(r['latency']):.2f}", widths]
            lines.append([METHODS[r["method"]], *shares, r["tokens_left"], lost, f"{float(r['lost_odd']):.1f}"])
    head = [
        "what leaves",
        "MACs",
        "latency",
        "widths' share",
        "tokens at the end",
        "points lost",
        "on every second image",
    ]
    return table(head, lines)


TABLES: dict[str, Callable[[], str]] = {"accuracy": accuracy}
