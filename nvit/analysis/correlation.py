"""How well saliency foretells the true loss change of a bundle that leaves (arXiv:2110.04869, App. B.5)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from .. import adapters, tasks
from ..adapters.base import Logits
from ..config import PruneConfig
from ..latency.table import LatencyTable
from ..layers import keep_
from ..prune.pruner import Pruner
from ..prune.scoring import score
from ..selection.bundles import units_gone
from ..spec import KINDS, TITLES, Group
from ..structure.masks import full_masks
from ..tasks import Task
from ..utils.progress import Progress, silent
from ..utils.style import line
from .figure import PIXELS, both_signs, few_decades, legend_below, panels

Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Bundle:
    """Units of one group that leave together; `proposed_by` names the criterion that would have them leave so."""

    group: Group
    units: tuple[int, ...]
    proposed_by: str


def saliencies(
    model: nn.Module, batches: Batches, criteria: Sequence[str], config: PruneConfig, progress: Progress = silent
) -> dict[str, dict[str, Tensor]]:
    """Scores of a prepared model by criterion and group, `(group.size,)`, from the same batches."""
    table, found = LatencyTable.analytic(model), {}
    for name in criteria:
        pruner = Pruner(model, table, replace(config, criterion=name, train=False))
        score(pruner, batches, progress=progress)
        found[name] = pruner.scores()
    return found


def propose(scores: Mapping[str, Mapping[str, Tensor]], groups: Sequence[Group], count: int) -> list[Bundle]:
    """About `count` bundles of every group, an equal number from each criterion's order, evenly over its ranks.

    A criterion's bundles are neighbours in its order, as pruning removes them. A group never leaves as a whole.
    """
    each, found = max(1, round(count / len(scores))), []
    for g in groups:
        # Pruning keeps the last bundle; here it may go alone, unless it is all there is.
        ends = [*units_gone(g.size, g.multiple).tolist(), g.size]
        spans = [(start, end) for start, end in itertools.pairwise(ends) if end - start < g.size]
        ranks = sorted({round(r) for r in np.linspace(0, len(spans) - 1, min(each, len(spans)))})
        for name, by_group in scores.items():
            order = by_group[g.name].argsort(stable=True).tolist()
            found += [Bundle(g, tuple(sorted(order[slice(*spans[r])])), name) for r in ranks]
    return found


@torch.inference_mode()
def _loss(model: nn.Module, batches: Batches, task: Task) -> float:
    """The task's mean loss over all images."""
    adapter, device, total = adapters.find(model), next(model.parameters()).device, 0.0
    for images, labels in batches:
        logits = Logits(adapter.logits(model, images.to(device)).mean.double())
        total += len(images) * float(task.loss(logits, task.labels(images, labels).to(device)))
    return total / sum(len(labels) for _, labels in batches)


def loss_changes(
    model: nn.Module,
    groups: Sequence[Group],
    bundles: Sequence[Bundle],
    batches: Batches,
    progress: Progress = silent,
    *,
    task: str = "auto",
) -> list[float]:
    """The mean loss without each bundle less that of the whole model, which is left as it was.

    Args:
        task: whose loss, by its name.

    Raises:
        ValueError: a task that reads no labels: with nothing removed its loss is at its least, and says nothing.
    """
    model.eval()
    whose = tasks.of(task, model)
    if not whose.reads_labels:
        raise ValueError(f"task {whose.name} has no loss of its own; correlation needs labels")
    dense, found = _loss(model, batches, whose), []
    try:
        for done, bundle in enumerate(bundles, start=1):
            masks = full_masks(groups)
            masks[bundle.group.name][list(bundle.units)] = False
            keep_(model, masks)
            found.append(_loss(model, batches, whose) - dense)
            progress(done, len(bundles), "remove")
    finally:
        keep_(model, full_masks(groups))
    return found


def rows_of(
    bundles: Sequence[Bundle], scores: Mapping[str, Mapping[str, Tensor]], changes: Sequence[float]
) -> list[dict[str, Any]]:
    """A row per bundle: what it is, the sum of its units' saliency by each criterion, the loss change."""
    return [
        {"group": b.group.name, "kind": b.group.kind, "proposed_by": b.proposed_by, "units": len(b.units)}
        | {name: float(by_group[b.group.name][list(b.units)].double().sum()) for name, by_group in scores.items()}
        | {"loss_change": change}
        for b, change in zip(bundles, changes, strict=True)
    ]


def rank_correlations(rows: Sequence[Mapping[str, Any]], criteria: Sequence[str]) -> list[dict[str, Any]]:
    """By criterion and kind (and `all`): Spearman's rank correlation, and loss change per saliency.

    The correlation is None where there are fewer than three bundles or one side is constant. The loss change per
    saliency is the quotient of the means: how far kinds are from comparable with each other.
    """
    found = []
    for name in criteria:
        for kind in ("all", *KINDS):
            mine = [r for r in rows if kind in ("all", r["kind"])]
            saliency, change = (np.array([r[key] for r in mine]) for key in (name, "loss_change"))
            if not mine:
                continue
            told = len(mine) > 2 and np.ptp(saliency) > 0 and np.ptp(change) > 0
            found.append(
                {
                    "criterion": name,
                    "kind": kind,
                    "bundles": len(mine),
                    "spearman": float(spearmanr(saliency, change).statistic) if told else None,
                    "loss_change_per_saliency": float(change.mean() / saliency.mean()) if saliency.any() else None,
                }
            )
    return found


def plot(
    rows: Sequence[Mapping[str, Any]],
    criteria: Sequence[str],
    path: Path | str,
    images: int = 0,
    pixels: int = PIXELS,
) -> None:
    """A panel per criterion, a colour and marker per kind: loss change over saliency, both on logarithmic axes.

    Args:
        images: that both were measured on; named in the title where known.
    """
    found = {(r["criterion"], r["kind"]): r["spearman"] for r in rank_correlations(rows, criteria)}
    title = f"{len(rows)} bundles removed one by one" + (f", {images} images" if images else "")
    with panels(len(criteria), path, pixels=pixels, height=3.0, title=title, sharey=True) as axes:
        shown: dict[str, Any] = {}
        both_signs(axes[0].yaxis, [r["loss_change"] for r in rows])  # before the points, whose margins it sets
        for panel, name in zip(axes, criteria, strict=True):
            for i, kind in enumerate(KINDS):
                mine = [r for r in rows if r["kind"] == kind]
                if mine:
                    x, y, look = [r[name] for r in mine], [r["loss_change"] for r in mine], line(i)
                    colours = {"edgecolors": look["color"], "facecolors": "none", "linewidths": 0.9}
                    shown[TITLES[kind]] = panel.scatter(x, y, s=13, marker=look["marker"], **colours)
            if all(r[name] > 0 for r in rows):
                panel.set_xscale("log")
                few_decades(panel.xaxis)
            rho = found[name, "all"]
            short = {kind: TITLES[kind].partition(" ")[0] for kind in KINDS}
            kinds = [f"{short[k]} {found[name, k]:.2f}" for k in KINDS if found.get((name, k)) is not None]
            by_kind = "\n".join(", ".join(kinds[at : at + 3]) for at in range(0, len(kinds), 3))
            panel.set(
                xlabel=f"saliency of the bundle\n{by_kind}",
                title=name + ("" if rho is None else f": Spearman {rho:.2f}"),
            )
        axes[0].set_ylabel("loss change without the bundle")
        legend_below(axes[0], shown)
