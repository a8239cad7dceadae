"""Write docs/saliency.md and saliency.png from benchmarks/results/{saliency_screen,saliency_draws,correlation}_cpu.csv.

python docs/make_saliency_page.py
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from nvit.analysis.correlation import rank_correlations

PAGE = Path(__file__).with_name("saliency.md")
FIGURE = PAGE.with_suffix(".png")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
CRITERIA = ("hessian", "nvit", "fisher")

TEXT = """# Which saliency foretells best what a model can spare

A real DeiT-Ti (dense: 80.77 % of imagenet_val1300, centre crop of 224 without resizing), pruned in one shot without
training, every saliency made of the same gate gradients of 1000 training images. Written by
`docs/make_saliency_page.py` from [the CSV](../benchmarks/results/saliency_screen_cpu.csv) of
`python -m benchmarks.bench_saliency_screen`.

## What won
`curvature`. Removing a set of units costs ½ Σ F over all pairs in it, to second order, with F the curvature of the loss
between gates. Two estimates of F are averaged, both from random cotangents of the logits (*probes*) whose covariance is
that of cross entropy's Gauss-Newton matrix, so that no label is read:

- the mean over images of g gᵀ, g the gate gradients of one image: right on average, but a thousand images are few for
  all pairs of a thousand units;
- E x xᵀ ∘ Σ E γ γᵀ over tokens, x the activations where units leave and γ their gradients, the Kronecker factors of
  Martens & Grosse (arXiv:1503.05671): it takes tokens for independent of each other, but averages over all of them.

Units leave one by one, each time the one that adds least to the sum; what it adds is its saliency (or what an earlier
one added, if that was more). It is the default of one-shot pruning (`--no-train`). `fisher`, the first estimate alone
with true labels and products of different units halved, stands in for it where memory is bounded (`--budget`) and in
several processes. While training the default stays `hessian`: `latency_weight` is on its scale, and no training run has
compared them.

The half of the validation images at even places chose, by KL divergence to the dense model; these are the {images}
others. The interval is the central 95 % of a paired bootstrap over images.

{finalists}

![KL divergence to the dense model by saliency](saliency.png)

### Other probes
`fisher` draws nothing; `curvature` draws its probes, and each draw prunes otherwise. {draws} draws, all kinds together,
all {all_images} images, mean and range ([CSV](../benchmarks/results/saliency_draws_cpu.csv),
`python -m benchmarks.bench_saliency_draws`):

{drawn}

So the draw in the other tables is a good one at 0.8. Over draws the divergence is 27, 18 and 9 % less than
`fisher`'s. Top-1 is level at 0.9, 0.7 points more at 0.8 (not significant for five of six draws), and three to five
points less at 0.65, significantly for every draw: where so much leaves at once no second-order estimate holds. Two
steps (`--rounds 2`) keep 58.9 % with `curvature` and 59.2 % with `fisher` at 0.65 (one draw), a refit 76.6 %
([refit.md](refit.md)). Divergence on the choosing half was the rule that picked the winner, and `curvature` stays the
default for that and for reading no label; who needs top-1 far down without steps or a refit takes `--criterion
fisher`. Two probes an image instead of one changed nothing (0.245 at 0.8).

## Screening
One kind of width at a time, 30 % of it removed, all its groups ranked together, and all kinds together to 0.8 of the
dense latency, {screened} images. KL divergence to the dense model, lower is better, top-1 in brackets. *leave*: the
gate where the unit leaves the network; other places look at a unit where it enters it, or in parts whose saliencies
are added. *both*: true labels and probes. *pairs*: the Kronecker estimate alone, *toward pairs* its mean with products
of gates.

{screen}

Read with care: {screened} images put a standard error of 1.6 points on a top-1, and the best of many is better in the
table than it is. `curvature` is first for hidden units, and level with its variant that reads labels as well for all
kinds together; its divergence is the least or close to it wherever little enough leaves to be of use. It is not ahead
everywhere: with half of the hidden units gone `fisher` keeps more top-1 at the same divergence, for values probes alone
do better, query and key dims hardly care, and heads, of which DeiT-Ti has three a block, are told apart better by
absolute values by dim.

## Saliency against the true change of the loss
The test of the paper's appendix B.5: bundles of every group leave one at a time, and the change of the loss is compared
with the sum of their saliency ({bundles} bundles, 200 training images, an equal number proposed by each criterion;
[CSV](../benchmarks/results/correlation_cpu.csv), `nvit analyze correlation deit_tiny_patch16_224 --data FOLDER
--no-resize --criterion hessian nvit fisher --bundles 6 --batches 4 --batch-size 50`). Spearman's rank correlation:

{correlation}

On these 200 images 62 bundles lower the loss by leaving; no squared score can say so, and they hold every
correlation down. Within the stream's six bundles a correlation says little. `fisher` is in the loss' own unit: its
saliency is within a factor of three of the true change for every kind, where the published `nvit` differs by a factor
of 260 between the stream and hidden units.

![loss change over saliency](correlation.png)

## What lost, and why
- **The mean over samples before the square** (*one batch of all*; `hessian` in the limit of a large batch): a trained
  model's mean gate gradient is near 0, what is left of it is noise.
- **The signed first-order term** in *second order*, for the same reason.
- **Linear saliencies across kinds** (*abs*, *roots*, *root of squares*): a sum of absolute values makes many small
  units look dear beside a few large ones, so that ranked globally it removes channels of the stream and heads, which
  the model can spare least. Squares make the kinds comparable without a factor for each.
- **The Kronecker estimate alone** on values: what a head gives is an average over tokens, and its tokens move together.
- **Interactions of all blocks at once** (docs/LOG.md): there are more pairs than samples to know them from.
- **The stream**: 30 % of its channels in one shot leave nothing of the model, whatever chooses them.
"""

SHOWN = {"fisher, probe, toward pairs": "curvature"}
"""Names in the product of what the screening calls by its parts."""


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
        return [what, f"`{SHOWN.get(r['saliency'], r['saliency'])}`", *numbers, gain]

    head = ["what leaves", "saliency", "top-1 %", "loss", "KL", "points over `hessian`"]
    return _table(head, [line(r) for r in rows])


def drawn(rows: Sequence[dict[str, str]]) -> str:
    """A line per latency: `fisher`, and mean and range over draws of `curvature`."""

    def over_draws(mine: Sequence[dict[str, str]], key: str, digits: int) -> str:
        found = [float(r[key]) for r in mine]
        return f"{mean(found):.{digits}f} ({min(found):.{digits}f} to {max(found):.{digits}f})"

    lines = []
    for target in dict.fromkeys(r["target"] for r in rows):
        fixed, *mine = (r for r in rows if r["target"] == target)
        numbers = [over_draws(mine, key, digits) for key, digits in (("top1", 1), ("kl", 3))]
        lines.append([target, f"{float(fixed['top1']):.1f}", numbers[0], f"{float(fixed['kl']):.3f}", numbers[1]])
    head = ["of the dense latency", "`fisher`, top-1 %", "`curvature`, top-1 %", "`fisher`, KL", "`curvature`, KL"]
    return _table(head, lines)


def correlation(rows: Sequence[dict[str, str]]) -> str:
    """A line per criterion: rank correlation by kind, and the greatest quotient of two kinds' loss per saliency."""
    numbers = [{k: float(v) if k in (*CRITERIA, "loss_change") else v for k, v in r.items()} for r in rows]
    found = {(r["criterion"], r["kind"]): r for r in rank_correlations(numbers, CRITERIA)}
    kinds = list(dict.fromkeys(kind for _, kind in found))
    lines = []
    for name in CRITERIA:
        scales = [found[name, k]["loss_change_per_saliency"] for k in kinds if k != "all"]
        spread = f"{max(scales) / min(scales):.3g}"
        lines.append([f"`{name}`", *(f"{found[name, k]['spearman']:.2f}" for k in kinds), spread])
    return _table(["criterion", *(f"`{k}`" for k in kinds), "kinds apart by a factor of"], lines)


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
        ["gate", "saliency", *(f"`{k}`" for k in kinds)],
        [[key[0], SHOWN.get(key[1], key[1]), *(cell(*key, k) for k in kinds)] for key in lines],
    )


def plot(rows: Sequence[dict[str, str]]) -> None:
    """A panel per kind: KL of every saliency with its gate where units leave, in order."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
    figure.savefig(FIGURE, dpi=130)
    plt.close(figure)


def _rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}_cpu.csv").open() as f:
        return list(csv.DictReader(f))


def main() -> None:
    rows, draws, bundles = (_rows(name) for name in ("saliency_screen", "saliency_draws", "correlation"))
    screened, reported = ([r for r in rows if r["stage"] == stage] for stage in ("screen", "report"))
    page = TEXT.format(
        images=reported[0]["images"],
        screened=screened[0]["images"],
        finalists=finalists(reported),
        draws=len({r["seed"] for r in draws} - {""}),
        all_images=draws[0]["images"],
        drawn=drawn(draws),
        screen=screening(screened),
        bundles=len(bundles),
        correlation=correlation(bundles),
    )
    PAGE.write_text(page)
    plot(screened)


if __name__ == "__main__":
    main()
