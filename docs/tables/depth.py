"""Latency of models of which sublayers have left."""

from __future__ import annotations

from docs.tables.base import rows, table


def latency() -> str:
    """Of dense, predicted and taken."""
    lines = [
        [r["case"], *(f"{float(r[k]):.3f}" for k in ("predicted", "taken")), f"{float(r['off']):+.1f} %"]
        for r in rows("absent_cpu")
    ]
    return table(["without", "predicted", "taken", "off"], lines)


TABLES = {"latency": latency}
