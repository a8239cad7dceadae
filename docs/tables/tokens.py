"""What tokens that merge cost, alone and with pruned widths."""

from __future__ import annotations

from collections.abc import Callable

from docs.tables.base import rows, table

METHODS = {
    "joint": "widths and tokens",
    "sharp": "widths and tokens",
    "polished": "widths and tokens, polished",
    "ToMe": "as many tokens in every block",
    "widths": "widths alone",
    "depth": "widths alone, or whole sublayers",
    "Torch-Pruning": "Torch-Pruning",
}
REFITTED = {"joint": "half of them coarse", "sharp": "sharp images"}
MODELS = {"deit_tiny_patch16_224": "DeiT-Ti", "vit_tiny_patch16_224": "ViT-Ti"}


def lost(of: str) -> str:
    """Points of top-1 lost at shares of the multiply-accumulates or of the latency, with 95 % intervals."""
    lines = []
    for r in rows("tokens_cpu"):
        if r["of"] == of:
            points = "{:.1f} ({:.1f} to {:.1f})".format(*(float(r[k]) for k in ("lost", "lost_low", "lost_high")))
            widths = f"{float(r['widths_ratio']):.2f}" if r["widths_ratio"] else "–"
            what = _what(r["method"], r["cost"])
            schedule = "uniform" if r["method"] == "ToMe" else r["schedule"] or "–"
            shares = [f"{float(r['macs']):.2f}", f"{float(r['latency']):.2f}", widths, schedule]
            odd = f"{float(r['lost_odd']):.1f}"
            lines.append([MODELS[r["model"]], what, *shares, r["tokens_left"], points, odd, r["calibration"]])
    head = ["model", "what leaves", "MACs", "latency", "widths' share", "schedule", "tokens at the end", "points lost"]
    return table([*head, "on every second image", "images"], lines)


def _what(method: str, cost: str = "") -> str:
    """What leaves, with the flags that were not as where nothing is said."""
    flags = ["--coarse 0"] * (method == "sharp") + [f"--cost {cost}"] * (cost not in ("", "auto", "measured"))
    return METHODS[method] + f" (`{' '.join(flags)}`)" * bool(flags)


def candidates() -> str:
    """KL to the dense model of what was compared, by model and target."""
    found: dict[tuple[str, str, str], list] = {}
    for r in rows("tokens_candidates_cpu"):
        if r["of"] == "macs" and r["method"] in REFITTED:
            found.setdefault((r["model"], r["target"], r["method"]), []).append(r)
    lines = []
    for (model, target, method), mine in found.items():
        alone = [r for r in mine if float(r["widths_ratio"]) == 1]
        least = min(float(r["distance"]) for r in mine)
        narrow: dict[str, dict[str, str]] = {}
        for r in sorted(mine, key=lambda r: -float(r["distance"])):
            if float(r["widths_ratio"]) < 1:
                narrow[r["widths_ratio"]] = r  # the nearest schedule comes last
        told = [_told(min(alone, key=lambda r: float(r["distance"])), least)] if alone else ["–"]
        wide_first = sorted(narrow.values(), key=lambda r: -float(r["widths_ratio"]))
        told.append("; ".join(f"{float(r['widths_ratio']):.2f}: {_told(r, least)}" for r in wide_first) or "–")
        lines.append([MODELS[model], target, REFITTED[method], *told])
    return table(["model", "MACs", "refitted on", "tokens alone, nearest schedule", "widths to, then tokens"], lines)


def _told(row: dict[str, str], least: float) -> str:
    distance = float(row["distance"])
    words = f"{distance:.3f}" if distance > least else f"**{distance:.3f}**"
    return f"{words} {row['schedule']}"


def elsewhere() -> str:
    """Share of the dense top-1 that is kept on Tiny-ImageNet."""
    lines = [
        [
            MODELS[r["model"]],
            _what(r["method"]),
            f"{float(r['macs']):.2f}",
            f"{float(r['dense']):.1f}",
            f"{float(r['top1']):.1f}",
            "{:.1f} ({:.1f} to {:.1f})".format(*(float(r[k]) for k in ("kept", "low", "high"))),
        ]
        for r in rows("elsewhere_cpu")
    ]
    return table(["model", "what leaves", "MACs", "dense top-1", "top-1", "% of dense kept"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": lambda: lost("macs"),
    "latency": lambda: lost("latency"),
    "candidates": candidates,
    "elsewhere": elsewhere,
}
