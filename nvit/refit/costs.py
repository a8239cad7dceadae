"""What pruning costs, measured: one group alone is cut to a few depths, what reads it refitted, and the distance to the
dense model taken on images that the refit did not see.

Predictions of second order rank the units of a group well and price groups against each other badly; costs of single
groups nearly add up to that of all together. Whether choosing by them wins is a measurement: docs/LOG.md.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..adapters.base import Logits
from ..calibration.capture import Place
from ..calibration.replay import Replay
from ..calibration.statistics import SiteStatistics
from ..layers import Prunable, prunable_layers
from ..selection.curves import Curve, depths
from ..spec import Group
from ..structure.masks import apply_, full_masks
from ..tasks import Task
from ..utils.devices import sent
from ..utils.progress import Progress, silent
from .gather import parts
from .inputs import Both, gather_inputs, refit_reader_
from .refit import refit_

DEPTHS = {"emb": (0.125, 0.25, 0.5), "heads": (0.25, 0.5, 0.75), "mlp": (0.25, 0.5, 0.75, 0.875)}
"""Shares of a group's units at which it is measured; where a kind is absent, those of heads."""

MEASURED, REFITTED = 96, 128
"""Images, at most, on which costs are measured, and that refit a whole model whose stream was cut."""


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
    progress: Progress = silent,
) -> dict[str, Curve]:
    """What the first units of every group with a score cost, all other groups whole.

    Memory: the stream before one block for all images, `MEASURED` and `REFITTED` images, and the moments of one block;
    a cut of the stream, which every layer reads, is refitted as a whole on `REFITTED` images (see `refit_`).

    Args:
        model: prepared, dense; as it was, afterwards.
        scores: by group `(group.size,)`; the units of least score leave first.
        batches: calibration images. One of four measures until there are `MEASURED`, the others refit.
        statistics, uniform: as in `refit_`.

    Returns:
        By group, the task's distance to the dense model at temperature 1. Groups without a choice are absent.

    Raises:
        ValueError: fewer than two images.
    """
    free = [g for g in groups if g.name in scores]
    plan = {g.name: depths(g.size, g.multiple, DEPTHS.get(g.kind, DEPTHS["heads"])) for g in free}
    found: dict[str, list[Tensor]] = {g.name: [] for g in free}
    total = sum(map(len, plan.values()))
    measure, full, layers = _Measure(model, batches, task), full_masks(groups), prunable_layers(model)

    def cuts(g: Group) -> Iterator[dict[str, Tensor]]:
        """Masks of each depth of a group alone."""
        for gone in plan[g.name]:
            yield full | {g.name: _without(scores[g.name], gone)}
            progress(sum(map(len, found.values())), total, "costs")

    def whole(g: Group) -> bool:
        return g.kind == "emb" or not found[g.name]

    replay = measure.replay
    for block in replay.adapter.block_names(model):
        inside = {n: m for n, m in layers.items() if n.startswith(f"{block}.")}
        mine = {g: {n: m for n, m in inside.items() if g.name in m.axes.values()} for g in free if g.kind != "emb"}
        if any(mine.values()):
            inputs = gather_inputs(replay, inside, (measure.fitted, measure.held), statistics, uniform)
        for g, cut in mine.items():
            for masks in cuts(g) if cut else ():
                with _cut(cut, masks, inputs):
                    found[g.name].append(measure.behind())
        replay.advance()
    for g in filter(whole, free):
        for masks in cuts(g):
            small = copy.deepcopy(model)
            apply_(small, groups, masks)
            if len(measure.few) > 1:  # `refit_` needs two
                refit_(small, model, groups, measure.few, statistics=statistics, uniform=uniform)
            found[g.name].append(measure.of(small))
    return _curves(plan, found)


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
def _cut(layers: Mapping[str, Prunable], masks: Mapping[str, Tensor], inputs: Mapping[str, Both]) -> Iterator[None]:
    """Layers compute over what `masks` keeps meanwhile, what reads it refitted."""
    weights = [p for layer in layers.values() for part in parts(layer, "out") for p in part.module.parameters()]
    before = [p.clone() for p in weights]
    try:
        for name, layer in layers.items():
            layer.keep_({axis: masks[group] for axis, group in layer.axes.items()})
            for part in parts(layer, "out") if name in inputs else ():
                refit_reader_(part, inputs[name])
        yield
    finally:
        for p, was in zip(weights, before, strict=True):
            p.copy_(was)
        for layer in layers.values():
            layer.keep_({axis: torch.ones_like(masks[group]) for axis, group in layer.axes.items()})


class _Deal:
    """Deals images one by one, however they come in batches: 0 refits, 1 chooses the ridge, 2 measures."""

    def __init__(self) -> None:
        self.seen = self.shown = 0

    def next(self) -> int:
        others = self.seen - self.shown
        hand = 2 if self.seen % 4 == 1 and self.shown < MEASURED else int(others % 5 == 1)
        self.seen, self.shown = self.seen + 1, self.shown + (hand == 2)
        return hand

    def of(self, images: Tensor) -> list[Tensor]:
        """The images of a batch that go to each."""
        hands = torch.tensor([self.next() for _ in images])
        return [images[hands == hand] for hand in range(3)]


class _Measure:
    """Images on their way through the dense model, and what it says of those that measure.

    Attributes:
        replay: all of them, at one block.
        fitted, held: numbers of the batches that refit, and that choose the ridge.
        few: the first images that refit, for `refit_`, which holds back some of its own.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Tensor], task: Task) -> None:
        self.model, self.task, self.replay = model, task, Replay(model)
        self.few: list[Tensor] = []
        hands: tuple[list[int], list[int]] = ([], [])
        device, deal, size = next(model.parameters()).device, _Deal(), 1
        shown: list[Tensor] = []
        for images in batches:
            *refitting, measuring = (sent(x, device) for x in deal.of(images))
            size = max(size, len(images))
            shown += [measuring] if len(measuring) else []
            for hand, x in zip(hands, refitting, strict=True):
                if len(x):
                    hand.append(len(self.replay))
                    self.replay.enter(x)
                    left = REFITTED - sum(map(len, self.few))
                    self.few += [x[:left]] if left > 0 else []
        if not shown:
            raise ValueError(f"costs are measured on images of their own, and there are {deal.seen}; give at least 2")
        self.fitted, self.held = hands
        self.shown = torch.cat(shown).split(size)
        first = len(self.replay)
        for x in self.shown:
            self.replay.enter(x)
        self.measured = range(first, len(self.replay))
        self.dense = [self.replay.adapter.logits(model, x) for x in self.shown]

    def behind(self) -> Tensor:
        """The distance with the current block as it is now, those behind it dense."""
        return self._mean(self.replay.rest(b, self.replay.run(b)) for b in self.measured)

    def of(self, model: nn.Module) -> Tensor:
        """The distance of another model."""
        return self._mean(self.replay.adapter.logits(model, x) for x in self.shown)

    def _mean(self, answers: Iterable[Logits]) -> Tensor:
        pairs = zip(answers, self.dense, strict=True)
        total = sum(self.task.distance(ours, dense, 1.0) * len(dense.cls) for ours, dense in pairs)
        return total / sum(map(len, self.shown))
