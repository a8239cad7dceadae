"""How sharply the loss curves in the weights of every structure (arXiv:2110.04869, Tab. 5 and App. C.2): mean Hessian
traces by Hutchinson's estimator, and Gauss-Newton's beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import adapters, tasks
from ..layers.functional import kernels
from ..spec import Group, Slice
from ..tasks.base import signs
from ..utils.progress import Progress, silent
from ..utils.style import line
from .figure import PIXELS, few_decades, legend_below, panels, whole_numbers

STRUCTURES = {"Q": "qk_dim", "K": "qk_dim", "V": "v_dim", "proj": "v_dim", "FC1": "mlp", "FC2": "mlp"}
"""The structures of a block as the paper names them, and the kind of width that a unit of each belongs to."""

MEASURES = {"trace": "Hessian", "gauss_newton": "Gauss-Newton"}
"""Keys of a row, and what a figure calls them."""


@dataclass(frozen=True)
class Weights:
    """The matrices of one structure in one block; a gated MLP has two in its FC1."""

    structure: str
    block: int
    slices: tuple[Slice, ...]

    def total(self, by_name: Mapping[str, Tensor]) -> Tensor:
        """The sum of the entries of these weights in tensors shaped as the parameters."""
        return torch.stack([s.of(by_name[s.name]).sum() for s in self.slices]).sum()

    def count(self) -> int:
        return sum(math.prod(s.view) for s in self.slices)


def weights_of(model: nn.Module, groups: Sequence[Group]) -> list[Weights]:
    """Every structure of every block of a prepared model; none where a block has no such width.

    Of QK's matrices the first is Q. Of V's and the MLP's, those that make units are V and FC1, those that read units
    (where they are scored) proj and FC2.
    """
    found = []
    for g in groups:
        if g.kind not in STRUCTURES.values():
            continue
        matrices = [s for s in g.slices if model.get_parameter(s.name).ndim == 2]
        if g.kind == "qk_dim":
            parts = (matrices[:1], matrices[1:])
        else:
            parts = ([s for s in matrices if not s.scored], [s for s in matrices if s.scored])
        names = [name for name, kind in STRUCTURES.items() if kind == g.kind]
        found += [Weights(name, g.blocks[0], tuple(part)) for name, part in zip(names, parts, strict=True) if part]
    return sorted(found, key=lambda w: (w.block, list(STRUCTURES).index(w.structure)))


def traces(
    model: nn.Module,
    structures: Sequence[Weights],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    probes: int = 1,
    seed: int = 0,
    task: str = "auto",
    total: int = 0,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Traces of the blocks of the Hessian that belong to each structure's weights, batch by batch.

    `trace`: vᵀHv over the structure's own weights for signs v drawn for all weights at once, H that of the task's mean
    loss (Hutchinson; one product with H a probe). `gauss_newton`: the squared gradient of a draw of the task's
    Gauss-Newton matrix. Both are unbiased. Memory is that of a step with the batch and of one gradient's graph.

    Args:
        model: prepared; left as it is.
        batches: images and labels.
        probes: products with H a batch.
        total: batches there are, for progress.

    Returns:
        By key of `MEASURES`, `(batches, structures)`, fp64, of a mean over images: the trace over the weights' number.

    Raises:
        ValueError: a task without labels, whose loss is at its least before anything has changed.
        FloatingPointError: a trace is not finite; names the batch.
    """
    whose, adapter = tasks.of(task, model), adapters.find(model)
    if not whose.reads_labels:
        raise ValueError(f"task {whose.name} has no loss of its own; sensitivity needs labels")
    names = list(dict.fromkeys(s.name for w in structures for s in w.slices))
    weights = [model.get_parameter(name) for name in names]
    counts = torch.tensor([w.count() for w in structures], dtype=torch.float64)
    device, generator = weights[0].device, torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {key: [] for key in MEASURES}
    model.eval()

    def shares(products: Sequence[Tensor]) -> Tensor:
        by_name = dict(zip(names, products, strict=True))
        return torch.stack([w.total(by_name) for w in structures]).double().cpu() / counts

    # A product with H goes backward through the backward pass, which fused kernels have not.
    with kernels(False), sdpa_kernel(SDPBackend.MATH):
        for index, (images, labels) in enumerate(batches, start=1):
            answer = adapter.logits(model, images.to(device))
            loss = whose.loss(answer, whose.labels(images, labels).to(device))
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            # One draw of Gauss-Newton's matrix is enough: its spread is that of images.
            probe = whose.probe(answer.mean, generator)
            newton = torch.autograd.grad(answer.mean, weights, probe, retain_graph=True)
            drawn = {"trace": [], "gauss_newton": [shares([g.square() / len(images) for g in newton])]}
            for left in reversed(range(probes)):
                v = [signs(w, generator).to(w) for w in weights]
                products = torch.autograd.grad(gradients, weights, v, retain_graph=bool(left))
                drawn["trace"].append(shares([a * b for a, b in zip(v, products, strict=True)]))
            for key, values in drawn.items():
                mean = torch.stack(values).mean(0)
                if not mean.isfinite().all():
                    raise FloatingPointError(f"a trace is not finite on batch {index}; check weights and data")
                found[key].append(mean)
            progress(index, total or index, "sensitivity")
    return {key: torch.stack(values) for key, values in found.items()}


def rows_of(structures: Sequence[Weights], found: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A row for every structure of every block, then for every structure over all blocks (`block` is "all"): the mean
    trace a weight by both estimates, each with its standard error (`_se`) over batches."""
    rows = []
    for at, w in enumerate(structures):
        rows.append({"structure": w.structure, "block": w.block} | _estimates(found, [at], structures))
    for name in STRUCTURES:
        if mine := [at for at, w in enumerate(structures) if w.structure == name]:
            rows.append({"structure": name, "block": "all"} | _estimates(found, mine, structures))
    return rows


def _estimates(found: Mapping[str, Tensor], places: list[int], structures: Sequence[Weights]) -> dict[str, Any]:
    counts = torch.tensor([structures[at].count() for at in places], dtype=torch.float64)
    row: dict[str, Any] = {"weights": int(counts.sum())}
    for key, values in found.items():
        each = values[:, places] @ (counts / counts.sum())
        row[key] = float(each.mean())
        row[f"{key}_se"] = float(each.std() / math.sqrt(len(each))) if len(each) > 1 else None
    return row


def plot(rows: Sequence[Mapping[str, Any]], path: Path | str, images: int = 0, pixels: int = PIXELS) -> None:
    """A panel per estimate, a line per structure over the blocks, counted from 1; logarithmic where all are above 0."""
    title = "mean trace a weight" + (f", {images} images" if images else "")
    blocks = [r for r in rows if r["block"] != "all"]
    with panels(len(MEASURES), path, pixels=pixels, width=3.6, height=3.0, title=title) as axes:
        shown: dict[str, Any] = {}
        for panel, (key, name) in zip(axes, MEASURES.items(), strict=True):
            for i, structure in enumerate(STRUCTURES):
                if mine := [r for r in blocks if r["structure"] == structure]:
                    x, y = [r["block"] + 1 for r in mine], [r[key] for r in mine]
                    off = [r[f"{key}_se"] or 0.0 for r in mine]
                    shown[structure] = panel.errorbar(x, y, off, **line(i), markersize=3.5)
            if all(r[key] > 0 for r in blocks):
                panel.set_yscale("log")
                few_decades(panel.yaxis)
            whole_numbers(panel.xaxis)
            panel.set(title=name, xlabel="block")
        legend_below(axes[0], shown)
