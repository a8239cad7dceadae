"""Towers pruned by features and by classes."""

from __future__ import annotations

from collections.abc import Callable

from docs.tables.base import rows, table

CASES = ("dense", "features", "classification")
STREAMS = {"whole": "whole", "restored": "pruned, restored", "narrow": "pruned"}


def towers() -> str:
    """A line for every way to prune DeiT-Ti without its head."""
    lines = []
    order = lambda r: (CASES.index(r["case"]), r["stream"] != "whole", int(r["epochs"]))  # noqa: E731
    for r in sorted(rows("features_cpu"), key=order):
        trained = f", {r['epochs']} epochs" if int(r["epochs"]) else ""
        points = f" ({float(r['knn_points']):+.1f} ± {float(r['knn_points_se']):.1f})" if r["case"] != "dense" else ""
        cosine = f"{float(r['cosine']):.3f}" if r["cosine"] else "–"
        case = r["case"] if r["case"] == "dense" else f"by {r['case']}{trained}"
        macs = f"{float(r['macs']) / 1e9:.3f}"
        lines.append(
            [case, STREAMS[r["stream"]], macs, cosine, f"{float(r['knn']):.1f}{points}", f"{float(r['probe']):.1f}"]
        )
    return table(["pruned", "stream", "GMACs", "cosine", "k-NN top-1", "linear probe"], lines)


TABLES: dict[str, Callable[[], str]] = {"towers": towers}
