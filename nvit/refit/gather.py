"""What linear layers of the pruned model receive beside what those of the dense one do, summed up for the ridge."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..calibration.capture import Enough, Place, capture
from ..calibration.replay import Replay
from ..calibration.statistics import SiteStatistics
from ..layers import LinearPart
from ..layers.sites import PLAIN
from .entries import Entry
from .ridge import Moments

Halves = tuple[Moments, Moments]
"""Of the batches that are fitted, and of those held back."""


@dataclass(frozen=True)
class Pair:
    """A pruned model and its dense original on their way through the same batches.

    Attributes:
        first_held: batches from this one on are held back.
    """

    ours: Replay
    theirs: Replay
    first_held: int

    def advance(self) -> None:
        """Both through the current block."""
        self.ours.advance()
        self.theirs.advance()


def parts(layer: nn.Module, end: str) -> list[LinearPart]:
    """The linear layers at one end of a prunable layer."""
    return [part for part in layer.linears() if part.end == end]


def row_weights(statistics: Mapping[Place, SiteStatistics] | None, place: Place, uniform: float) -> Tensor | None:
    """`weights_of` what statistics know of a place. None, where they do not, for all alike."""
    known = None if statistics is None else statistics.get(place)
    return None if known is None else weights_of(known.profile, uniform)


def weights_of(profile: Tensor, uniform: float) -> Tensor:
    """How much each row of an image counts, `(rows per image,)` with mean 1: by the energy of its Gauss-Newton
    gradients, but for a share `uniform` that all have alike."""
    mean = profile.mean()
    return torch.where(mean > 0, uniform + (1 - uniform) * profile / mean, 1.0)


def moments_at(pair: Pair, place: Place, weights: Tensor | None, entry: Entry | None) -> list[Halves]:
    """Moments of every linear layer at one end of a layer.

    Args:
        place: the layer's name, and `in` or `out`.
        weights: of the rows of one image.
        entry: the layer also makes good what the stream lacks before it.
    """
    name, end = place
    ours, theirs = (parts(replay.model.get_submodule(name), end) for replay in (pair.ours, pair.theirs))
    found: list[Halves] = []
    norm = None if entry is None else entry.norm
    for b in range(len(pair.ours)):
        x, *before = rows_at(pair.ours, place, b, norm)
        exact, *before_exact = rows_at(pair.theirs, place, b, norm)
        lacking = 0.0 if entry is None else entry.lacking(before[0], before_exact[0], ours[0].rows)
        w = None if weights is None else weights.repeat(len(x) // len(weights)).to(x.device)
        for i, (part, source) in enumerate(zip(ours, theirs, strict=True)):
            target = linear(exact, *replace(source, cols=None, rows=part.rows).kept())
            r = target - linear(x, *part.kept()) + lacking
            if b == 0:
                found.append(tuple(Moments.empty(x.shape[1], r.shape[1], x.device) for _ in range(2)))
            found[i][b >= pair.first_held].add(x, r, target, w)
    return found


def rows_at(replay: Replay, place: Place, batch: int, norm: str | None = None) -> list[Tensor]:
    """Rows that the linear layers at one end of a layer receive, and rows of the stream that `norm` reads."""
    found: dict[Place, Tensor] = {}
    name, end = place
    site = replay.model.get_submodule(name).sites()[end]

    def sink(where: Place, x: Tensor, _) -> None:
        found[where] = site.rows(x) if where == place else PLAIN.rows(x)
        if where == place:
            raise Enough

    places = [place] if norm is None else [(norm, "in"), place]
    with capture(replay.model, places, sink, gradients=False), contextlib.suppress(Enough):
        replay.run(batch)
    return [found[place], *(found[p] for p in places[:-1])]


@contextlib.contextmanager
def inputs_of(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What layers are called with meanwhile, call by call, as rows."""
    found: dict[str, list[Tensor]] = {}

    def sink(place: Place, x: Tensor, _) -> None:
        found.setdefault(place[0], []).append(PLAIN.rows(x))

    with capture(model, [(name, "in") for name in layers], sink, gradients=False):
        yield found


def classifier_moments(
    ours: LinearPart,
    theirs: LinearPart,
    xs: Sequence[Tensor],
    exact: Sequence[Tensor],
    first_held: int,
    weights: Tensor | None = None,
) -> Halves:
    """Moments of a classifier that reads `xs` where the dense one, `theirs`, reads `exact`, batch by batch.

    Args:
        weights: of the rows of one image, where it reads several.
    """
    weight, bias = ours.kept()
    found = tuple(Moments.empty(xs[0].shape[1], len(weight), xs[0].device) for _ in range(2))
    for b, (x, e) in enumerate(zip(xs, exact, strict=True)):
        target = linear(e, *theirs.kept())
        w = None if weights is None else weights.repeat(len(x) // len(weights)).to(x.device)
        found[b >= first_held].add(x, target - linear(x, weight, bias), target, w)
    return found
