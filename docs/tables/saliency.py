"""Which saliency foretells best: finalists, draws, the screening, and rank correlations with the true loss change."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from docs.tables.base import Row, gain, rows, table
from nvit.analysis.correlation import rank_correlations

CRITERIA = ("hessian", "nvit", "fisher")
SHOWN = {"fisher, probe, toward pairs": "curvature"}
"""Names in the product of what the screening calls by its parts."""


def stage(name: str) -> list[Row]:
    """Rows of `screen` or of `report`."""
    return [r for r in rows("saliency_screen_cpu") if r["stage"] == name]


def finalists(rows: Sequence[Row]) -> str:
    """A line per structure, fraction and saliency."""

    def line(r: Row) -> list[str]:
        what = f"all kinds, {float(r['fraction']):g} of the dense latency"
        if r["structure"] != "all":
            what = f"`{r['structure']}`, {100 * float(r['fraction']):g} % gone"
        over = "–" if r["saliency"] == "hessian" else gain(r, "top1_over_hessian", "low", "high")
        numbers = [f"{float(r[k]):.{d}f}" for k, d in (("top1_report", 1), ("loss_report", 3), ("kl_report", 3))]
        return [what, f"`{SHOWN.get(r['saliency'], r['saliency'])}`", *numbers, over]

    head = ["what leaves", "saliency", "top-1 %", "loss", "KL", "points over `hessian`"]
    return table(head, [line(r) for r in rows])


def drawn(rows: Sequence[Row]) -> str:
    """A line per latency: `fisher`, and mean and range over draws of `curvature`."""

    def over_draws(mine: Sequence[Row], key: str, digits: int) -> str:
        found = [float(r[key]) for r in mine]
        return f"{mean(found):.{digits}f} ({min(found):.{digits}f} to {max(found):.{digits}f})"

    lines = []
    for target in dict.fromkeys(r["target"] for r in rows):
        fixed, *mine = (r for r in rows if r["target"] == target)
        numbers = [over_draws(mine, key, digits) for key, digits in (("top1", 1), ("kl", 3))]
        lines.append([target, f"{float(fixed['top1']):.1f}", numbers[0], f"{float(fixed['kl']):.3f}", numbers[1]])
    head = ["of the dense latency", "`fisher`, top-1 %", "`curvature`, top-1 %", "`fisher`, KL", "`curvature`, KL"]
    return table(head, lines)


def correlation(rows: Sequence[Row]) -> str:
    """A line per criterion: rank correlation by kind, and the greatest quotient of two kinds' loss per saliency."""
    numbers = [{k: float(v) if k in (*CRITERIA, "loss_change") else v for k, v in r.items()} for r in rows]
    found = {(r["criterion"], r["kind"]): r for r in rank_correlations(numbers, CRITERIA)}
    kinds = list(dict.fromkeys(kind for _, kind in found))
    lines = []
    for name in CRITERIA:
        scales = [found[name, k]["loss_change_per_saliency"] for k in kinds if k != "all"]
        spread = f"{max(scales) / min(scales):.3g}"
        lines.append([f"`{name}`", *(f"{found[name, k]['spearman']:.2f}" for k in kinds), spread])
    return table(["criterion", *(f"`{k}`" for k in kinds), "kinds apart by a factor of"], lines)


def screening(rows: Sequence[Row]) -> str:
    """A line per place and saliency, a column per kind; a kind's best is bold."""
    kinds = list(dict.fromkeys(r["structure"] for r in rows))
    cells = {(r["gate"], r["saliency"], r["structure"]): r for r in rows}
    best = {k: min(float(r["kl_choose"]) for r in rows if r["structure"] == k) for k in kinds}

    def cell(gate: str, name: str, kind: str) -> str:
        if (r := cells.get((gate, name, kind))) is None:
            return ""
        kl = f"{float(r['kl_choose']):.3f}"
        return f"{f'**{kl}**' if float(r['kl_choose']) == best[kind] else kl} ({float(r['top1_choose']):.1f})"

    lines = dict.fromkeys((r["gate"], r["saliency"]) for r in rows)
    return table(
        ["gate", "saliency", *(f"`{k}`" for k in kinds)],
        [[key[0], SHOWN.get(key[1], key[1]), *(cell(*key, k) for k in kinds)] for key in lines],
    )


TABLES = {
    "finalists": lambda: finalists(stage("report")),
    "draws": lambda: drawn(rows("saliency_draws_cpu")),
    "screening": lambda: screening(stage("screen")),
    "correlation": lambda: correlation(rows("correlation_cpu")),
}
