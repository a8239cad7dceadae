"""What pruning costs, measured: one group alone is cut to a few depths, what reads it refitted, and the distance to the
dense model taken on images that the refit did not see.

Predictions of second order rank the units of a group well and price groups against each other badly; costs of single
groups nearly add up to that of all together. Whether choosing by them wins is a measurement: docs/LOG.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..calibration.capture import Place
from ..calibration.replay import Replay
from ..calibration.statistics import SiteStatistics
from ..layers import Prunable, prunable_layers
from ..selection.curves import Curve, depths
from ..spec import Group
from ..structure.masks import full_masks
from ..tasks import Task
from ..utils.devices import portions
from ..utils.progress import Progress, silent
from .gather import parts
from .inputs import Exact, fit_, gather_inputs, refit_reader_
from .judge import Judge

DEPTHS = {
    "emb": (0.125, 0.5),
    "heads": (0.25, 0.5, 0.75),
    "qk_dim": (0.5, 0.75, 0.875),
    "mlp": (0.25, 0.5, 0.75, 0.875),
}
"""Shares of a group's units at which it is measured; where a kind is absent, those of heads."""

SHALLOW = DEPTHS | {"emb": (0.125,), "qk_dim": (0.5, 0.75), "mlp": (0.25, 0.5)}
"""The same where tokens merge as well: of DeiT-Ti and ViT-Ti down to 0.4 of the dense latency no group left further."""


@torch.inference_mode()
def measure_costs(
    model: nn.Module,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    batches: Iterable[Tensor],
    *,
    task: Task,
    statistics: Mapping[Place, SiteStatistics] | None = None,
    uniform: float = 0.2,
    shares: Mapping[str, Sequence[float]] = DEPTHS,
    depth: bool = False,
    progress: Progress = silent,
) -> dict[str, Curve]:
    """What the first units of every group with a score cost, all other groups whole.

    Memory: the stream before one block and what one layer reads for all images, the images that a `Judge` holds, and
    the moments of one block. A cut of the stream, which every layer reads, is refitted as a whole (see `Judge.of`).

    Args:
        model: prepared, dense; as it was, afterwards.
        scores: by group `(group.size,)`; the units of least score leave first.
        batches: calibration images. One of four measures until there are `MEASURED`, the others refit.
        statistics, uniform: as in `refit_`.
        shares: of a group's units, by kind, at which it is measured.
        depth: also what it costs that a sublayer leaves whole, at the end of the curve of the group it leaves with.

    Returns:
        By group, the task's distance to the dense model at temperature 1. Groups without a choice are absent.

    Raises:
        ValueError: fewer than two images.
    """
    free = [g for g in groups if g.name in scores]
    plan = {
        g.name: depths(g.size, g.multiple, shares.get(g.kind, shares["heads"]))
        + [g.size] * (depth and g.ends is not None)
        for g in free
    }
    found: dict[str, list[Tensor]] = {g.name: [] for g in free}
    total = sum(map(len, plan.values()))
    full, layers = full_masks(groups), prunable_layers(model)
    judge = Judge(model, groups, task, statistics=statistics, uniform=uniform)
    replay, halves, shown = _entered(model, batches, judge)

    def cuts(g: Group) -> Iterator[dict[str, Tensor]]:
        """Masks of each depth of a group alone."""
        for gone in plan[g.name]:
            yield full | {g.name: _without(scores[g.name], gone)}
            progress(sum(map(len, found.values())), total, "costs")

    def whole(g: Group) -> bool:
        return g.kind == "emb" or not found[g.name]

    for block in replay.adapter.block_names(model):
        inside = {n: m for n, m in layers.items() if n.startswith(f"{block}.")}
        mine = {g: {n: m for n, m in inside.items() if g.name in m.axes.values()} for g in free if g.kind != "emb"}
        read = {n: m for g, cut in mine.items() for n, m in cut.items() if not _changes(g, m)}
        inputs = gather_inputs(replay, read, halves, statistics, uniform) if read else {}
        for g, cut in mine.items():
            changed = {n: Exact.of(replay, n, halves, statistics, uniform) for n, m in cut.items() if _changes(g, m)}
            for masks in cuts(g) if cut else ():
                with _cut(cut, masks):
                    for part, name in ((part, n) for n, layer in cut.items() for part in parts(layer, "out")):
                        if name in changed:
                            fit_(part, changed[name].moments(replay, part, halves))
                        elif name in inputs:
                            refit_reader_(part, inputs[name])
                    found[g.name].append(judge.near.mean(replay.rest(b, replay.run(b)) for b in shown))
        replay.advance()
    for g in filter(whole, free):
        for masks in cuts(g):
            found[g.name].append(judge.of(masks))
    return _curves(plan, found)


def _entered(
    model: nn.Module, batches: Iterable[Tensor], judge: Judge
) -> tuple[Replay, tuple[list[int], list[int]], range]:
    """Images at the first block of the dense model: numbers of the batches that refit and that choose the ridge, and of
    those that measure."""
    replay, halves = Replay(model), ([], [])
    for images in batches:
        for half, x in zip(halves, judge.take(images), strict=True):
            for part in portions(x, x.device) if len(x) else ():
                half.append(len(replay))
                replay.enter(part)
    judge.ready()
    first = len(replay)
    for x in judge.shown:
        replay.enter(x)
    return replay, halves, range(first, len(replay))


def _changes(group: Group, layer: Prunable) -> bool:
    """Whether units of a group change what a layer's last linear layers read, and take none of it away: queries and
    keys."""
    return "out" in layer.sites() and bool(parts(layer, "out")) and group.kind not in layer.sites()["out"].axes


def _without(score: Tensor, gone: int) -> Tensor:
    """A keep without the `gone` units of least score."""
    keep = torch.ones(len(score), dtype=torch.bool)
    keep[score.cpu().argsort(stable=True)[:gone]] = False
    return keep


def _curves(plan: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[Tensor]]) -> dict[str, Curve]:
    """From costs still on their device; all are read at once."""
    costs = [c for costs in found.values() for c in costs]
    values = iter(torch.stack(costs).tolist() if costs else ())
    return {n: Curve(tuple(plan[n]), tuple(next(values) for _ in costs)) for n, costs in found.items() if costs}


@contextlib.contextmanager
def _cut(layers: Mapping[str, Prunable], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Layers compute over what `masks` keeps meanwhile; what changes in their last linear layers is taken back."""
    weights = [p for layer in layers.values() for part in parts(layer, "out") for p in part.module.parameters()]
    before = [p.clone() for p in weights]
    try:
        for layer in layers.values():
            layer.keep_({axis: masks[group] for axis, group in layer.axes.items()})
        yield
    finally:
        for p, was in zip(weights, before, strict=True):
            p.copy_(was)
        for layer in layers.values():
            layer.keep_({axis: torch.ones_like(masks[group]) for axis, group in layer.axes.items()})
