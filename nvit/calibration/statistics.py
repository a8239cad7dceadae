"""Second moments of activations and of their gradients, at the places where units leave."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import adapters
from ..layers import prunable_layers
from ..utils.progress import Progress, silent
from .capture import Place, capture


@dataclass
class Seen:
    """Sums at one place over images; `d` counts what a row there holds.

    Attributes:
        images, rows: how many.
        x, xx: Σ x `(d,)`, Σ x xᵀ `(d, d)` over rows.
        gg: Σ g gᵀ `(d, d)`.
        profile: Σ |g|² by row of an image `(rows per image,)`.
    """

    images: int = 0
    rows: int = 0
    x: Tensor | float = 0.0
    xx: Tensor | float = 0.0
    gg: Tensor | float = 0.0
    profile: Tensor | float = 0.0

    def add(self, x: Tensor, g: Tensor, images: int) -> None:
        """Rows `(rows, d)` of a batch, those of an image one after another."""
        self.images, self.rows = self.images + images, self.rows + len(x)
        self.x = self.x + x.sum(0, dtype=torch.float64)
        self.xx = self.xx + (x.T @ x).double()
        self.gg = self.gg + (g.T @ g).double()
        self.profile = self.profile + g.square().sum(1).view(images, -1).sum(0, dtype=torch.float64)

    @property
    def covariance(self) -> Tensor:
        """Of rows, `(d, d)`."""
        mean = self.x / self.rows
        return self.xx / self.rows - torch.outer(mean, mean)

    @property
    def curvature(self) -> Tensor:
        """Σ over an image's rows of the curvature, `(d, d)`: loss per squared change."""
        return self.gg / self.images


class GateProducts:
    """Σ over images of the products of two gate gradients, the gates of single dims at one place.

    Attributes:
        images: how many.
        sums: `(d, d)` fp64 by place; gates of the stream count at all its places together, under `(group, "emb")`.
    """

    def __init__(self) -> None:
        self.images, self.sums, self._now = 0, {}, {}

    def add(self, place: Place, products: Tensor) -> None:
        """Activation times gradient of a batch, summed over an image's rows, `(images, d)`.

        A norm that reads several tokens side by side has as many dims for a channel of the stream.
        """
        before = self._now.get(place, torch.zeros_like(products))
        d = min(before.shape[1], products.shape[1])
        self._now[place] = sum(p.view(len(p), -1, d).sum(1) for p in (before, products))

    def close_batch(self) -> None:
        """All places of the batch were there."""
        for place, p in self._now.items():
            self.sums[place] = (self.sums.get(place, 0.0) + p.T @ p).double()
        self.images += max((len(p) for p in self._now.values()), default=0)
        self._now.clear()


def probe(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A draw whose second moment is the curvature of cross entropy at `logits` `(batch, classes)`."""
    p = logits.detach().float().softmax(-1)
    signs = torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1
    half = p.sqrt() * signs
    return (half - p * half.sum(-1, keepdim=True)).to(logits)


@contextmanager
def _frozen(trainable: Mapping[nn.Parameter, bool]) -> Iterator[None]:
    """Parameters want no gradient inside."""
    try:
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for p, was in trainable.items():
            p.requires_grad_(was)


def watch(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    gates: GateProducts | None = None,
    seed: int = 0,
    total: int = 0,
    progress: Progress = silent,
) -> dict[Place, Seen]:
    """One pass over images through a prepared model, forward and backward; weights are frozen meanwhile.

    Args:
        gates: gathers products of gate gradients beside.

    Raises:
        ValueError: there is no batch.
        FloatingPointError: a logit is not finite.
    """
    seen: dict[Place, Seen] = {}
    layers = prunable_layers(model)
    trainable = {p: p.requires_grad for p in model.parameters()}
    device = next(model.parameters()).device
    images_now = [0]

    def sink(place: Place, act: Tensor, grad: Tensor) -> None:
        name, site = place
        x, g = (layers[name].sites()[site].rows(t).float() for t in (act, grad))
        seen.setdefault(place, Seen()).add(x, g, images_now[0])
        if gates is not None and site != "in":
            where = (layers[name].axes["emb"], "emb") if site == "emb" else place
            gates.add(where, (x * g).view(images_now[0], -1, x.shape[1]).sum(1))

    # What enters a layer matters where linear layers read it.
    places = [
        (name, site)
        for name, layer in layers.items()
        for site in layer.sites()
        if layer.sites()[site].axes or (site == "in" and any(part.end == "out" for part in layer.linears()))
    ]
    with _frozen(trainable), capture(model, places, sink):
        generator = torch.Generator().manual_seed(seed)
        for done, images in enumerate(batches, start=1):
            images_now[0] = len(images)
            logits = adapters.find(model).logits(model, images.to(device)).mean
            if not bool(logits.isfinite().all()):
                raise FloatingPointError(f"a logit is not finite on calibration batch {done}; check weights and data")
            logits.backward(probe(logits, generator))
            if gates is not None:
                gates.close_batch()
            progress(done, total, "curvature")
    if not seen:
        raise ValueError("no batch of calibration images; the loader gave none")
    return seen
