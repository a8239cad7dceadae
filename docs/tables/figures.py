"""The figures of pages that no benchmark draws itself."""

from __future__ import annotations

from pathlib import Path

from docs.tables.saliency import SHOWN, stage


def saliency(path: Path) -> None:
    """A panel per kind: KL of every saliency with its gate where units leave, in order."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = stage("screen")
    kinds = list(dict.fromkeys(r["structure"] for r in rows))
    figure, panels = plt.subplots(1, len(kinds), figsize=(3.3 * len(kinds), 3.8), squeeze=False, layout="constrained")
    for panel, kind in zip(panels[0], kinds, strict=True):
        mine = [r for r in rows if r["structure"] == kind and r["gate"] in ("leave", "tokens")]
        mine.sort(key=lambda r: -float(r["kl_choose"]))
        colours = ["tab:orange" if r["saliency"] in SHOWN else "tab:blue" for r in mine]
        panel.barh(
            [SHOWN.get(r["saliency"], r["saliency"]) for r in mine],
            [float(r["kl_choose"]) for r in mine],
            color=colours,
        )
        panel.tick_params(axis="y", labelsize="x-small")
        share = float(mine[0]["fraction"])
        what = f"all, {share:g} of latency" if kind == "all" else f"{kind}, {100 * share:g} % gone"
        panel.set(title=what, xlabel="KL to the dense model")
    figure.savefig(path, dpi=130)
    plt.close(figure)
