"""How different the heads of a block are (arXiv:2110.04869, App. C.1): where they look, and what they say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import adapters
from ..calibration.capture import Place, capture
from ..layers import prunable_layers
from ..layers.functional import kernels
from ..utils.progress import Progress, silent
from ..utils.style import line
from .figure import PIXELS, legend_below, panels, whole_numbers

MEASURES = {"map_distance": "attention maps: total variation", "output_distance": "outputs: 1 - CKA"}
"""Keys of a row, and what a figure calls them."""


@torch.inference_mode()
def head_diversity(
    model: nn.Module, batches: Iterable[Tensor], *, total: int = 0, progress: Progress = silent
) -> list[dict[str, Any]]:
    """A row for every block of a prepared model: `block`, `heads`, and means over pairs of heads, None where there are
    fewer than two.

    `map_distance`: half of the summed difference of two heads' attention to a query's keys (total variation, 0 to 1),
    mean over queries and images; with its standard error over images (`_se`). `output_distance`: 1 less the linear CKA
    (arXiv:1905.00414) of two heads' outputs over all tokens of all images.

    Args:
        batches: images `(batch, channels, height, width)`.
        total: batches there are, for progress.
    """
    layers = {name: layer for name, layer in prunable_layers(model).items() if "maps" in layer.sites()}
    adapter, device = adapters.find(model), next(model.parameters()).device
    distances: dict[str, list[Tensor]] = {name: [] for name in layers}
    products = {name: _Products() for name in layers}

    def see(place: Place, x: Tensor, _: Tensor | None) -> None:
        name, site = place
        if site == "maps":
            distances[name].append(_map_distances(x.float()).cpu())
        else:
            products[name].add(x)

    model.eval()
    with kernels(False), capture(model, [(n, s) for n in layers for s in ("maps", "out")], see, gradients=False):
        for index, images in enumerate(batches, start=1):
            adapter.logits(model, images.to(device))
            progress(index, total or index, "attention")
    rows = []
    for number, block in enumerate(adapter.blocks(model)):
        name = next((n for n, layer in layers.items() if any(layer is m for m in block.modules())), "")
        row: dict[str, Any] = {"block": number, "heads": layers[name].kept[0] if name else 0}
        row |= dict.fromkeys(("map_distance", "map_distance_se", "output_distance"))
        if row["heads"] > 1:
            each = torch.cat(distances[name]).double()
            row["map_distance"] = float(each.mean())
            row["map_distance_se"] = float(each.std() / math.sqrt(len(each))) if len(each) > 1 else None
            row["output_distance"] = 1 - products[name].cka(row["heads"])
        rows.append(row)
    return rows


def _map_distances(maps: Tensor) -> Tensor:
    """`(images, [windows,] heads, queries, keys)` to the mean distance of an image's pairs of heads, `(images,)`."""
    maps = maps.movedim(-3, 0)
    pairs = [
        0.5 * (maps[i] - maps[j]).abs().sum(-1).flatten(1).mean(1)
        for i in range(len(maps))
        for j in range(i + 1, len(maps))
    ]
    return torch.stack(pairs).mean(0) if pairs else maps.new_zeros(maps.shape[1])


class _Products:
    """Σ over tokens of the products of all heads' outputs, fp64, for CKA without keeping the outputs."""

    def __init__(self) -> None:
        self.count, self.sum, self.square = 0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        """`(images, [windows,] tokens, heads, dims)`"""
        rows = x.flatten(-2).flatten(0, -2).double()
        self.count += len(rows)
        self.sum, self.square = self.sum + rows.sum(0), self.square + rows.T @ rows

    def cka(self, heads: int) -> float:
        """Mean linear CKA of pairs of heads; heads whose output never changes are like any other one."""
        centred = self.square - torch.outer(self.sum, self.sum) / self.count
        size = len(centred) // heads
        norms = centred.view(heads, size, heads, size).square().sum((1, 3)).sqrt()
        own = norms.diagonal()
        scale = torch.outer(own, own).sqrt()
        cka = torch.where(scale > 0, norms.square() / scale.square().clamp_min(1e-300), 1.0)
        first, second = torch.triu_indices(heads, heads, 1)
        return float(cka[first, second].mean())


def plot(
    models: Mapping[str, Sequence[Mapping[str, Any]]], path: Path | str, images: int = 0, pixels: int = PIXELS
) -> None:
    """A panel per measure, a line per model over the blocks, counted from 1; a gap where a block has one head."""
    title = "mean distance of two heads of a block" + (f", {images} images" if images else "")
    with panels(len(MEASURES), path, pixels=pixels, width=3.6, height=2.6, title=title) as axes:
        shown: dict[str, Any] = {}
        for panel, (key, name) in zip(axes, MEASURES.items(), strict=True):
            for i, (model, rows) in enumerate(models.items()):
                values = [math.nan if r[key] is None else r[key] for r in rows]
                (shown["/".join(Path(model).parts[-2:])],) = panel.plot(
                    [r["block"] + 1 for r in rows], values, **line(i), markersize=3.5
                )
            panel.set(title=name, xlabel="block", xlim=(0.4, max(map(len, models.values())) + 0.6))
            panel.set_ylim(bottom=0)
            whole_numbers(panel.xaxis)
        legend_below(axes[0], shown)
