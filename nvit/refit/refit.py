"""Refit of what pruning leaves, in closed form, from calibration images: no training, no labels.

Block by block, what a linear layer of the pruned model receives is compared with what the dense one receives on the
same images, and a ridge on the *change* of its weight brings its output nearest to the dense output (`ridge.ridge`).
Earlier layers are refitted already when a later one is looked at, so that errors do not pile up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..calibration.capture import Place
from ..calibration.replay import Replay
from ..calibration.statistics import SiteStatistics
from ..layers import LinearPart, prunable_layers
from ..spec import Group
from ..utils.devices import portions, sent
from ..utils.progress import Progress, silent
from .entries import entries, refittable
from .gather import Halves, Pair, classifier_moments, inputs_of, moments_at, parts, row_weights
from .ridge import ridge

HELD = 0.2
"""The share of the calibration batches that chooses the strength of the ridge."""


@torch.inference_mode()
def refit_(
    model: nn.Module,
    dense: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Tensor],
    *,
    statistics: Mapping[Place, SiteStatistics] | None = None,
    readers: bool = True,
    stream: bool = True,
    held: float = HELD,
    uniform: float = 0.2,
    progress: Progress = silent,
) -> list[dict]:
    """Refit a masked model to its dense original, in place; only weights change.

    Args:
        dense: the prepared model that was masked, before it was.
        batches: calibration images; the last `held` of them choose the strength of the ridge.
        statistics: of `dense`, see `gather_statistics`: rows count by the energy of their Gauss-Newton gradients, but
            for a share `uniform` that all have alike. Without it all rows count alike.
        readers: refit what reads the stream (queries, keys, values, first MLP layers) as well as what writes it.
        stream: what writes the stream also makes good what the stream lacks before it, where `entries` finds how.

    Returns:
        By layer and end: squared error per row before and after, held back.

    Raises:
        ValueError: fewer than two batches.
    """
    pair = _enter(model, dense, batches, held)
    names = pair.ours.adapter.block_names(model)
    layers, their_layers = prunable_layers(model), prunable_layers(dense)
    behind = [n for n, m in layers.items() if m.reads_only and not any(n.startswith(f"{b}.") for b in names)]
    report = []
    for at, block in enumerate(names):
        inside = {n: m for n, m in their_layers.items() if n.startswith(f"{block}.")}
        entered = entries(pair.theirs, inside) if stream else {}
        mine = [n for n, m in inside.items() if refittable(m)]
        for name in mine:
            for end in ("in", "out") if readers else ("out",):
                weights = row_weights(statistics, (name, end), uniform)
                moments = moments_at(pair, (name, end), weights, entered.get(name) if end == "out" else None)
                for part, halves in zip(parts(layers[name], end), moments, strict=True):
                    report.append(_change_(f"{name}.{end}", part, halves))
            if later := mine[mine.index(name) + 1 :]:
                pair.ours.settle(layers[name], [layers[n] for n in later])
                pair.theirs.settle(their_layers[name], ())
        with inputs_of(model, behind) as xs, inputs_of(dense, behind) as exact:
            pair.advance()
        for name in xs:
            (ours,), (theirs,) = layers[name].linears(), their_layers[name].linears()
            # One that restores the stream's width reads what its norm, around it, hands on.
            weights = row_weights(statistics, (name.rpartition(".")[0], "emb"), uniform)
            halves = classifier_moments(ours, theirs, xs[name], exact[name], pair.first_held, weights)
            # It sees a row an image, too few to choose a ridge for every class: all share one.
            report.append(_change_(name, ours, halves, shared=True))
        progress(at + 1, len(names), "refit")
    return report


def _enter(model: nn.Module, dense: nn.Module, batches: Iterable[Tensor], held: float) -> Pair:
    """Both models with all batches at the first block."""
    ours, theirs = Replay(model), Replay(dense)
    device, starts = next(model.parameters()).device, []
    for images in batches:
        starts.append(len(ours))
        for x in portions(sent(images, device), device):
            ours.enter(x)
            theirs.enter(x)
    count = len(starts)
    if count < 2:
        raise ValueError(f"refit got {count} batches of calibration images; it needs 2, one to choose the ridge with")
    return Pair(ours, theirs, starts[first_held(count, held)])


def first_held(count: int, held: float = HELD) -> int:
    """Of so many batches, the first of those that are held back: they choose the ridge, and no weight is fitted to
    them."""
    return min(count - 1, max(1, round(count * (1 - held))))


def _change_(where: str, part: LinearPart, halves: Halves, *, shared: bool = False) -> dict:
    """Change a linear layer by the ridge, if any change is better than none; returns its row of the report."""
    change = ridge(*halves, constant=part.module.bias is not None, shared=shared)
    if change is None:
        return {"layer": where, "before": 0.0, "after": 0.0}
    part.add_(change.weight, change.bias)
    return {"layer": where, "before": change.before, "after": change.after}
