"""2:4 by second-order information, layer by layer: what SparseGPT (arXiv:2301.00774) does for language models.

Every projection is looked at behind those that are sparse already, on calibration images without labels. Its weight is
first the one that brings its outputs nearest to the dense model's, all weights staying (a ridge on the change, which
makes good what earlier layers do wrong); then `pairs.best_pairs` chooses which two of four leave, and
`pairs.best_values` finds the values of what stays. Layers that write the stream also make good what it lacks.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..calibration.capture import Enough, Place, capture
from ..calibration.replay import Replay
from ..layers import LinearPart, Prunable, prunable_layers
from ..layers.sites import PLAIN
from ..refit.entries import Entry, entries, refittable
from ..refit.gather import row_weights
from ..refit.ridge import Moments
from ..tasks import Task
from ..utils.devices import sent
from ..utils.progress import Progress, silent
from .pairs import best_pairs, best_values
from .profile import row_profiles

DAMPING = 0.1
"""Added to the diagonal of the inputs' covariance, as a share of its mean; also the strength of the ridge."""

_UNIFORM = 0.2
"""Share of the rows' weight that all rows have alike."""

_PROFILED = 128
"""Images that say how much a row counts."""

_LEAST = 1e-12
"""Of the inputs' mean square: the damping of inputs that do not vary at all."""


@torch.no_grad()
def choose_by_curvature_(
    model: nn.Module,
    batches: Iterable[Tensor],
    names: Collection[str],
    *,
    damping: float = DAMPING,
    task: Task | None = None,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Make projections 2:4 and change what stays, in place, so that the blocks compute what they did.

    The other projections of the blocks stay dense, with weights that make good what earlier ones do wrong.

    Args:
        model: prepared, in evaluation mode, with no masks on.
        batches: calibration images; all are kept, with one block's activations.
        names: of the weights to make sparse, as `masks_2to4` names them; multiples of 4 wide.
        task: whose probes say how much rows count; the one that the model tells if None.

    Returns:
        Bool masks of these weights' shapes.

    Raises:
        ValueError: there is no batch.
        FloatingPointError: a logit is not finite.

    >>> model = nvit.load(nvit.BUNDLED)
    >>> images = torch.stack([image for image, label in nvit.data.Digits(training=False)])
    >>> names = ["blocks.0.mlp.fc1.weight"]
    >>> masks = nvit.sparse24.choose_by_curvature_(model, images[:90].split(30), names)
    >>> float(masks[names[0]].float().mean())
    0.5
    """
    batches = list(batches)
    if not batches:
        raise ValueError("no batch of calibration images; the loader gave none")
    dense = copy.deepcopy(model)
    profiles = row_profiles(dense, _first(batches, _PROFILED), task=task)
    ours, theirs = Replay(model), Replay(dense)
    for images in batches:
        for replay in (ours, theirs):
            replay.enter(sent(images, next(model.parameters()).device))
    blocks = ours.adapter.block_names(model)
    masks: dict[str, Tensor] = {}
    for at, block in enumerate(blocks):
        inside = {n: m for n, m in prunable_layers(dense).items() if n.startswith(f"{block}.") and refittable(m)}
        recorded = _record(theirs, inside, block)
        for name in inside:
            layer = prunable_layers(model)[name]
            for site in ("in", "out"):
                read = _reading(layer, site)
                weights = row_weights(profiles.get((name, site)), _UNIFORM)
                moments = _moments(ours, (name, site), recorded, _reading(inside[name], site), weights)
                for part, mine in zip(read, _split(moments, read), strict=True):
                    weight = f"{name}.{part.name}.weight"
                    if weight in names:
                        masks[weight] = _solve_(part.module, mine, damping, sparse=True)
                    else:
                        _solve_(part.module, mine, damping, sparse=False)
        ours.advance()
        progress(at + 1, len(blocks), "2:4 by curvature")
    return masks


def _first(batches: Sequence[Tensor], images: int) -> Iterator[Tensor]:
    """So many images, in the batches they are in."""
    for batch in batches:
        if images <= 0:
            return
        yield batch[:images]
        images -= len(batch)


@dataclass(frozen=True)
class _Recorded:
    """What the dense model's block read.

    Attributes:
        rows: by place, of every batch.
        entries: how layers' outputs enter the stream, by layer.
    """

    rows: Mapping[Place, list[Tensor]]
    entries: Mapping[str, Entry]


def _record(theirs: Replay, layers: Mapping[str, Prunable], block: str) -> _Recorded:
    """Send the dense model through its current block, looking on."""
    every = prunable_layers(theirs.model)
    entered = entries(theirs, {n: m for n, m in every.items() if n.startswith(f"{block}.")})
    places = [(name, site) for name in layers for site in ("in", "out")]
    norms = [(e.norm, "in") for name, e in entered.items() if name in layers]
    rows: dict[Place, list[Tensor]] = {place: [] for place in [*places, *norms]}

    def sink(place: Place, x: Tensor, _) -> None:
        site = every[place[0]].sites()[place[1]] if place in places else PLAIN
        rows[place].append(site.rows(x))

    with capture(theirs.model, list(rows), sink, gradients=False):
        theirs.advance()
    return _Recorded(rows, entered)


def _reading(layer: Prunable, site: str) -> list[LinearPart]:
    """The linear layers that read at a site: `out` is what the last one reads, `in` what all others do."""
    return [part for part in layer.linears() if (part.end == "out") == (site == "out")]


def _moments(
    ours: Replay, place: Place, recorded: _Recorded, theirs: Sequence[LinearPart], weights: Tensor | None
) -> Moments:
    """Moments of what linear layers read at a place of the sparse model, and of what they should give: the dense
    layers' outputs side by side, and what the stream lacks before the layer where it is written."""
    name, site = place
    entry = recorded.entries.get(name) if site == "out" else None
    found = None
    for b in range(len(ours)):
        x, before = _read(ours, place, b, None if entry is None else entry.norm)
        exact = recorded.rows[place][b]
        target = torch.cat([linear(exact, part.module.weight, part.module.bias) for part in theirs], 1)
        if entry is not None:
            target += entry.lacking(before, recorded.rows[entry.norm, "in"][b], None)
        if found is None:
            found = Moments.empty(x.shape[1], target.shape[1], x.device)
        found.add(x, target, target, None if weights is None else weights.repeat(len(x) // len(weights)).to(x.device))
    return found


def _read(replay: Replay, place: Place, batch: int, norm: str | None) -> tuple[Tensor, Tensor | None]:
    """Rows that linear layers read at a place of the current block, and rows of the stream that `norm` reads."""
    found: dict[Place, Tensor] = {}
    site = prunable_layers(replay.model)[place[0]].sites()[place[1]]

    def sink(where: Place, x: Tensor, _) -> None:
        found[where] = site.rows(x) if where == place else PLAIN.rows(x)
        if where == place:
            raise Enough

    places = [place] if norm is None else [(norm, "in"), place]
    with capture(replay.model, places, sink, gradients=False), contextlib.suppress(Enough):
        replay.run(batch)
    return found[place], None if norm is None else found[norm, "in"]


def _split(moments: Moments, parts: Sequence[LinearPart]) -> Iterator[Moments]:
    """Of each linear layer, of those whose outputs lie side by side."""
    end = 0
    for part in parts:
        begin, end = end, end + len(part.module.weight)
        mine = {f: getattr(moments, f)[begin:end] for f in ("r", "rx", "rr", "tt")}
        yield replace(moments, **mine)


def _solve_(layer: nn.Linear, moments: Moments, damping: float, *, sparse: bool) -> Tensor | None:
    """Give a linear layer the weight and bias that its moments ask for; the mask, if it is to be sparse."""
    mean_x, mean_t = moments.x / moments.weight, moments.r / moments.weight
    if layer.bias is None:
        mean_x, mean_t = torch.zeros_like(mean_x), torch.zeros_like(mean_t)
    hessian, cross, _ = moments.about(mean_x, mean_t)
    square = float((moments.xx.diagonal() / moments.weight).mean())
    # Where all inputs are zero any ridge will do: magnitudes alone decide.
    ridge = max(damping * float(hessian.diagonal().mean()), _LEAST * square) or 1.0
    hessian.diagonal().add_(ridge)
    cross += ridge * layer.weight
    weight, mask = torch.linalg.solve(hessian, cross, left=False), None
    if sparse:
        _, mask = best_pairs(weight, hessian)
        weight = best_values(hessian, cross, mask)
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(mean_t - weight @ mean_x)
    return mask
