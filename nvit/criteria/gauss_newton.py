"""What criteria share that are made of Gauss-Newton statistics: how these are gathered, and where units are in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..calibration.capture import Place
from ..calibration.gauss_newton import GateProducts
from ..calibration.statistics import SiteStatistics, StatisticsRecorder
from ..layers import prunable_layers
from ..spec import Group
from .base import Capabilities, Context, Criterion


class GaussNewton(Criterion):
    """A criterion made of the statistics of many images, from probes of the logits in place of a loss.

    Attributes:
        gates: products of gate gradients, for those that want them.
    """

    capabilities = Capabilities(labels=False, training=False, ranks=False, budget=False)

    def __init__(self, momentum: float | None = None) -> None:
        super().__init__(momentum)
        self.recorder: StatisticsRecorder | None = None
        self.gates: GateProducts | None = None

    def begin(self, context: Context) -> None:
        super().begin(context)
        if self.wants_images:
            if self.recorder is None:
                self.recorder = StatisticsRecorder(
                    context.model, task=context.task, gates=self.gates, seed=context.seed
                )
            self.recorder.__enter__()

    def backward(self, logits: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        self.recorder.backward(logits)

    @property
    def statistics(self) -> Mapping[Place, SiteStatistics]:
        """Those that were known already, or have been gathered.

        Raises:
            ValueError: neither.
            FloatingPointError: a logit was not finite.
        """
        if self.context is not None and not self.wants_images:
            return self.context.statistics
        found = {} if self.recorder is None else self.recorder.statistics
        if not found:
            raise ValueError("no batch of calibration images; the loader gave none")
        return found

    def close(self) -> None:
        super().close()
        if self.recorder is not None:
            self.recorder.__exit__()


def places_of(
    model: nn.Module, groups: Sequence[Group], statistics: Mapping[Place, SiteStatistics]
) -> dict[str, list[Place]]:
    """Where the units of each group leave.

    Raises:
        ValueError: a group at none of whose places statistics were gathered.
    """
    places: dict[str, list[Place]] = {g.name: [] for g in groups}
    for name, layer in prunable_layers(model).items():
        for axis, group in layer.axes.items():
            site = next((s for s, declared in layer.sites().items() if axis in declared.axes), "")
            if group in places and (name, site) in statistics:
                places[group].append((name, site))
    for name, found in places.items():
        if not found:
            raise ValueError(f"{name}: no gradient reached where its units leave; this criterion cannot rank it")
    return places


def dims_of(kind: str, units: int, d: int) -> Tensor:
    """Which of `d` dims each unit owns, `(units, dims of a unit)`."""
    every = torch.arange(d)
    if kind == "heads":
        return every.view(units, -1)
    return every.view(-1, units).T


def widened(group: Group, mask: Tensor, narrow: Tensor) -> Tensor:
    """Scores of kept units among those of all units, zero elsewhere: `(kept,)` -> `(group.size,)`."""
    return narrow.new_zeros(group.size).index_copy_(0, mask.nonzero().squeeze(1).cpu(), narrow.cpu())
