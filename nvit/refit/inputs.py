"""What linear layers of the dense model read, summed up once: what any cut of their inputs can be made good with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..calibration.capture import Place, capture
from ..calibration.replay import Replay
from ..calibration.statistics import SiteStatistics
from ..layers import LinearPart, Prunable
from .gather import Halves, parts, row_weights, rows_at
from .ridge import Moments, ridge


@dataclass
class Inputs:
    """Weighted sums over rows of what a layer reads, fp64: Σ w, Σ w·x `(in,)`, Σ w·x xᵀ `(in, in)`."""

    weight: Tensor | float = 0.0
    x: Tensor | float = 0.0
    xx: Tensor | float = 0.0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add rows `(rows, in)` of these weights `(rows,)`; 1 where not given."""
        x = x if x.dtype == torch.float64 else x.float()
        w = x.new_ones(len(x)) if weights is None else weights.to(x)
        xw = x * w[:, None]
        self.weight = self.weight + w.double().sum()
        self.x = self.x + (w @ x).double()
        self.xx = self.xx + (xw.T @ x).double()

    def without(self, weight: Tensor, cols: Tensor) -> Moments:
        """Moments of a layer `weight` `(out, in)` that keeps the inputs `cols` and lacks what the others gave it."""
        gone = torch.ones(len(self.x), dtype=torch.bool, device=cols.device).index_fill_(0, cols, False)
        gone = gone.nonzero().squeeze(1)
        whole = weight.double()
        lost = whole[:, gone]
        rx = lost @ self.xx[gone]
        return Moments(
            weight=self.weight,
            x=self.x[cols],
            r=lost @ self.x[gone],
            xx=self.xx[cols][:, cols],
            rx=rx[:, cols],
            rr=(rx[:, gone] * lost).sum(1),
            tt=((whole @ self.xx) * whole).sum(1),
        )


Both = tuple[Inputs, Inputs]
"""Of the batches that are fitted, and of those held back to choose the ridge with."""


def gather_inputs(
    replay: Replay,
    layers: Mapping[str, Prunable],
    halves: Sequence[Sequence[int]],
    statistics: Mapping[Place, SiteStatistics] | None,
    uniform: float,
) -> dict[str, Both]:
    """What the layers' last linear layers read in the current block, by layer.

    Args:
        halves: numbers of the batches that are fitted, and of those held back.
        statistics, uniform: as in `refit_`.
    """
    places = [(n, "out") for n, m in layers.items() if "out" in m.sites() and parts(m, "out")]
    found = {n: (Inputs(), Inputs()) for n, _ in places}
    weights = {place: row_weights(statistics, place, uniform) for place in places}
    for half, batches in enumerate(halves):

        def sink(place: Place, x: Tensor, _, half: int = half) -> None:
            rows, w = layers[place[0]].sites()["out"].rows(x), weights[place]
            found[place[0]][half].add(rows, None if w is None else w.repeat(len(rows) // len(w)))

        with capture(replay.model, places, sink, gradients=False):
            for b in batches:
                replay.run(b)
    return found


@dataclass(frozen=True)
class Exact:
    """What a layer's last linear layers read in the dense model, row by row: what a cut that changes these inputs, and
    takes none away, is made good with.

    Attributes:
        rows: by batch, `(rows, in)`.
        weights: of the rows of one image; None for all alike.
    """

    place: Place
    rows: Mapping[int, Tensor]
    weights: Tensor | None

    @classmethod
    def of(
        cls,
        replay: Replay,
        layer: str,
        halves: Sequence[Sequence[int]],
        statistics: Mapping[Place, SiteStatistics] | None,
        uniform: float,
    ) -> Exact:
        """Of a layer of the current block, nothing cut."""
        place = layer, "out"
        rows = {b: rows_at(replay, place, b)[0] for batches in halves for b in batches}
        return cls(place, rows, row_weights(statistics, place, uniform))

    def moments(self, replay: Replay, part: LinearPart, halves: Sequence[Sequence[int]]) -> Halves:
        """Moments of a linear layer that reads what the block, as it is now, hands it, where it read `rows`."""
        out, width = part.module.weight.shape
        found = tuple(Moments.empty(width, out, part.module.weight.device) for _ in range(2))
        for half, batches in zip(found, halves, strict=True):
            for b in batches:
                x, target = rows_at(replay, self.place, b)[0], linear(self.rows[b], *part.kept())
                w = None if self.weights is None else self.weights.repeat(len(x) // len(self.weights)).to(x.device)
                half.add(x, target - linear(x, *part.kept()), target, w)
        return found


def refit_reader_(part: LinearPart, inputs: Both) -> None:
    """Let a linear layer, some of whose inputs are gone, make good what they gave it, as far as the others can."""
    if part.cols is None or not all(isinstance(half.weight, Tensor) for half in inputs):
        return
    fit_(part, tuple(half.without(part.module.weight, part.cols) for half in inputs))


def fit_(part: LinearPart, halves: Halves) -> None:
    """Change a linear layer by the ridge, if any change is better than none."""
    change = ridge(*halves, constant=part.module.bias is not None)
    if change is not None:
        part.add_(change.weight, change.bias)
