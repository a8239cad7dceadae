"""Write docs/saliency.md and docs/saliency.png from benchmarks/results/saliency_screen_cpu.csv.

python docs/make_saliency_page.py
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).with_name("saliency.md")
FIGURE = PAGE.with_suffix(".png")
ROWS = Path(__file__).parents[1] / "benchmarks" / "results" / "saliency_screen_cpu.csv"

TEXT = """# Which saliency foretells best what a model can spare

A real DeiT-Ti (dense: 80.77 % of imagenet_val1300, centre crop of 224 without resizing), pruned in one shot without
training, every saliency made of the same gate gradients of 1000 training images. Written by
`docs/make_saliency_page.py` from [the CSV](../benchmarks/results/saliency_screen_cpu.csv) of
`python -m benchmarks.bench_saliency_screen`.

## What won
`fisher`. Let g be the vector of one sample's gate gradients in one group, and F the mean over samples of g gᵀ. Removing
a set of units costs ½ Σ F over all pairs in it, to second order and with the Fisher matrix for the Hessian. Units leave
one by one, each time the one that adds least to this sum; what it adds is its saliency (or what an earlier one added,
if that was more). Products of different units count half: of a thousand samples much of what they say is noise.
It is the default of one-shot pruning (`--no-train`). While training the default stays `hessian`: `latency_weight` is on
its scale, and no training run has compared them.

Finalists on {images} images that chose nothing. The interval is the central 95 % of a paired bootstrap over images; the
KL divergence is from the dense model's outputs.

{finalists}

![KL divergence to the dense model by saliency](saliency.png)

## Screening
One kind of width at a time, 30 % of it removed, all its groups ranked together, {screened} images. KL divergence to the
dense model, lower is better, top-1 in brackets. *leave*: the gate where the unit leaves the network; other places look
at a unit where it enters it, or in parts whose saliencies are added. A *probe* is a random cotangent of the logits with
the covariance of the softmax, which needs no label.

{screen}

Read with care: {screened} images put a standard error of 2 points and more on a top-1, and the best of many is better
in the table than it is. `fisher` is not first everywhere: with true labels it gains nothing on `v_dim`, where not
shrunk, or with probes, it is well ahead. Shrinkage earns its place where all kinds are ranked together (docs/LOG.md).

## What lost, and why
- **The mean over samples before the square** (*one batch of all*; `hessian` in the limit of a large batch): a trained
  model's mean gate gradient is near 0, what is left of it is noise.
- **The signed first-order term** in *second order*, for the same reason.
- **`abs` across kinds** (docs/LOG.md): a sum of absolute values makes many small units look dear beside a few large
  ones, so that ranked globally it removes channels of the stream and heads, which the model can spare least. Squares
  make the kinds comparable without a factor for each.
- **Interactions of all blocks at once** (docs/LOG.md): there are more pairs than samples to know them from.
- **The stream**: 30 % of its channels in one shot leave nothing of the model, whatever chooses them.
- **Heads**: DeiT-Ti has three a block, of which one can leave, so the table says little; there absolute values by
  dim (*dims*) did best.
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def finalists(rows: Sequence[dict[str, str]]) -> str:
    """A line per structure, fraction and saliency."""

    def line(r: dict[str, str]) -> list[str]:
        what = f"all kinds, {float(r['fraction']):g} of the dense latency"
        if r["structure"] != "all":
            what = f"`{r['structure']}`, {100 * float(r['fraction']):g} % gone"
        gain = "–"
        if r["saliency"] != "hessian":
            gain = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(float(r[k]) for k in ("top1_over_hessian", "low", "high")))
        numbers = [f"{float(r[k]):.{d}f}" for k, d in (("top1_report", 1), ("loss_report", 3), ("kl_report", 3))]
        return [what, f"`{r['saliency']}`", *numbers, gain]

    head = ["what leaves", "saliency", "top-1 %", "loss", "KL", "points over `hessian`"]
    return _table(head, [line(r) for r in rows])


def screening(rows: Sequence[dict[str, str]]) -> str:
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
    return _table(
        ["gate", "saliency", *(f"`{k}`" for k in kinds)], [[*key, *(cell(*key, k) for k in kinds)] for key in lines]
    )


def plot(rows: Sequence[dict[str, str]]) -> None:
    """A panel per kind: KL of every saliency with its gate where units leave, in order."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(r["structure"] for r in rows))
    figure, panels = plt.subplots(1, len(kinds), figsize=(3.3 * len(kinds), 3.8), squeeze=False, layout="constrained")
    for panel, kind in zip(panels[0], kinds, strict=True):
        mine = [r for r in rows if r["structure"] == kind and r["gate"] == "leave"]
        mine.sort(key=lambda r: -float(r["kl_choose"]))
        colours = ["tab:orange" if r["saliency"] == "fisher" else "tab:blue" for r in mine]
        panel.barh([r["saliency"] for r in mine], [float(r["kl_choose"]) for r in mine], color=colours)
        panel.tick_params(axis="y", labelsize="x-small")
        panel.set(title=f"{kind}, {100 * float(mine[0]['fraction']):g} % gone", xlabel="KL to the dense model")
    figure.savefig(FIGURE, dpi=130)
    plt.close(figure)


def main() -> None:
    with ROWS.open() as f:
        rows = list(csv.DictReader(f))
    screened, reported = ([r for r in rows if r["stage"] == stage] for stage in ("screen", "report"))
    page = TEXT.format(
        images=reported[0]["images"],
        screened=screened[0]["images"],
        finalists=finalists(reported),
        screen=screening(screened),
    )
    PAGE.write_text(page)
    plot(screened)


if __name__ == "__main__":
    main()
