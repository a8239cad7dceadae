"""Latency and accuracy of models of which sublayers have left."""

from __future__ import annotations

from docs.tables.base import rows, table


def latency() -> str:
    """Of dense, predicted and taken."""
    lines = [
        [r["case"], *(f"{float(r[k]):.3f}" for k in ("predicted", "taken")), f"{float(r['off']):+.1f} %"]
        for r in rows("absent_cpu")
    ]
    return table(["without", "predicted", "taken", "off"], lines)


def accuracy() -> str:
    """Points of top-1 lost where sublayers may leave, beside widths alone."""
    lines = []
    for r in rows("depth_cpu"):
        ahead = [float(r[k]) for k in ("gain", "low", "high") if r[k]]
        gain = "{:+.1f} ({:+.1f} to {:+.1f})".format(*ahead) if ahead else ""
        shares = [f"{float(r['measured']):.2f}", f"{float(r['macs']):.2f}"]
        points = [f"{float(r[k]):.1f}" for k in ("lost", "lost_odd")]
        distance = f"{float(r['distance']):.2f}"
        lines.append([r["target"], WAYS[r["way"]], *shares, r["absent"] or "–", *points, gain, distance])
    head = ["latency", "what leaves", "measured", "MACs", "absent", "points lost", "on every second image"]
    return table([*head, "ahead of widths alone", "KL when chosen"], lines)


WAYS = {
    "widths": "widths",
    "less depth": "widths and sublayers, these at twice the cost",
    "depth": "widths and sublayers",
}
TABLES = {"latency": latency, "accuracy": accuracy}
