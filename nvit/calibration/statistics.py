"""Second moments of activations and of Gauss-Newton gradients, at the places where units leave or linear layers read:
the Kronecker factors of curvature."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import adapters, tasks
from ..layers import prunable_layers
from ..tasks import Task
from ..utils.devices import sent
from ..utils.progress import Progress, silent
from .capture import Place, capture
from .gauss_newton import GateProducts, Probes


@dataclass
class SiteStatistics:
    """Sums at one place over images; `d` counts what a row there holds.

    Attributes:
        images, rows: how many.
        x, xx: Σ x `(d,)`, Σ x xᵀ `(d, d)` over rows.
        gg: Σ g gᵀ `(d, d)`, g the gradient that a probe of the logits causes.
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
        self.x = self.x + x.sum(0).double()
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
        """Gauss-Newton curvature in the activation, summed over an image's rows, `(d, d)`: loss per squared change."""
        return self.gg / self.images


class StatisticsRecorder:
    """Gathers `SiteStatistics` of every place of a prepared model from `backward` passes, while it is open.

    Opened again it goes on with what it has.

    Args:
        task: whose probes are sent backward; the one that the model tells if None.

    Attributes:
        gates: products of gate gradients, gathered beside if given.
    """

    def __init__(
        self, model: nn.Module, *, task: Task | None = None, gates: GateProducts | None = None, seed: int = 0
    ) -> None:
        self.layers, self.gates, self.model = prunable_layers(model), gates, model
        self.probes = Probes(task or tasks.of("auto", model), next(model.parameters()).device, seed)
        self._sums: dict[Place, SiteStatistics] = {}
        self._images, self._captured = 0, None
        # What enters a layer matters where linear layers read it.
        self.places = [
            (name, site)
            for name, layer in self.layers.items()
            for site, declared in layer.sites().items()
            if declared.axes or (site == "in" and any(part.end == "out" for part in layer.linears()))
        ]

    def __enter__(self) -> StatisticsRecorder:
        self._captured = capture(self.model, self.places, self._add)
        self._captured.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self._captured is not None:
            captured, self._captured = self._captured, None
            captured.__exit__(*(error or (None, None, None)))

    def backward(self, logits: Tensor) -> None:
        """Send a probe of the logits `(images, classes)` of a batch backward.

        Raises:
            FloatingPointError: a logit is not finite. Off the CPU `statistics` raises it.
        """
        self._images = len(logits)
        self.probes.send(logits)
        if self.gates is not None:
            self.gates.close_batch()

    @property
    def statistics(self) -> dict[Place, SiteStatistics]:
        """By place, of all batches so far.

        Raises:
            FloatingPointError: a logit was not finite.
        """
        self.probes.check()
        return self._sums

    def _add(self, place: Place, act: Tensor, grad: Tensor) -> None:
        name, site = place
        x, g = (self.layers[name].sites()[site].rows(t).float() for t in (act, grad))
        self._sums.setdefault(place, SiteStatistics()).add(x, g, self._images)
        if self.gates is not None and site != "in":
            where = (self.layers[name].axes["emb"], "emb") if site == "emb" else place
            self.gates.add(where, (x * g).view(self._images, -1, x.shape[1]).sum(1))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters want no gradient inside."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for p, was in wanted.items():
            p.requires_grad_(was)


def gather_statistics(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    task: Task | None = None,
    gates: GateProducts | None = None,
    seed: int = 0,
    total: int = 0,
    progress: Progress = silent,
) -> dict[Place, SiteStatistics]:
    """One pass over images through a prepared model, forward and backward; weights are frozen meanwhile.

    Args:
        task: whose probes are sent backward; the one that the model tells if None.
        gates: gathers products of gate gradients beside.

    Raises:
        ValueError: there is no batch.
        FloatingPointError: a logit is not finite.
    """
    device = next(model.parameters()).device
    with _frozen(model), StatisticsRecorder(model, task=task, gates=gates, seed=seed) as recorder:
        for done, images in enumerate(batches, start=1):
            recorder.backward(adapters.find(model).logits(model, sent(images, device)).mean)
            progress(done, total, "statistics")
    found = recorder.statistics
    if not found:
        raise ValueError("no batch of calibration images; the loader gave none")
    return found
