"""Tokens merged down to a share of the work: a schedule of each family costs that much, and the calibration images say
which of them keeps the model's answers best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import adapters, tasks
from ..config import PruneConfig
from ..selection.schedules import FAMILIES, Merges, weakest
from ..structure.compact import meta_copy
from ..structure.masks import full_masks, widths
from ..structure.verify import evaluating
from ..utils.devices import sent

if TYPE_CHECKING:
    from ..tasks import Task


def work_of(model: nn.Module) -> Callable[[Merges], int]:
    """Multiply-accumulates of an image as a function of how many tokens merge in each block; the model, dense or
    compact, stays as it is."""
    adapter = adapters.find(model)
    skeleton = adapter.prepare(meta_copy(model))
    groups = adapter.groups(skeleton)
    blocks = widths(groups, full_masks(groups))

    def work(merges: Merges) -> int:
        adapter.merge_(skeleton, merges)
        total = 0
        for part in adapter.parts(skeleton):
            macs = adapter.part_macs(skeleton, part)
            for piece in part.pieces:
                total += macs(*(getattr(blocks[b], kind) for b, kind in zip(piece, part.kinds, strict=True)))
        return total

    return work


def check_merging(model: nn.Module, config: PruneConfig) -> None:
    """Raise ValueError where a recipe lets tokens of a model merge that cannot, or do already."""
    if not config.merges_tokens:
        return
    if (reason := adapters.find(model).merge_refusal(model)) is not None:
        raise ValueError(f"only tokens: {reason}. Leave out tokens (--only widths)")
    if adapters.merges(model):
        raise ValueError(
            "only tokens: tokens of this model merge already; leave out tokens (--only widths), or end it first "
            "(nvit.adapters.merge_(model, ()))"
        )


def least_share(model: nn.Module, config: PruneConfig) -> float:
    """The share of a model's work that is left where as many tokens merge as a schedule lets; 1 where a recipe lets
    none."""
    if not config.merges_tokens:
        return 1.0
    check_merging(model, config)
    work = work_of(model)
    return min(map(work, schedules(model, None).values())) / work(())


def schedules(model: nn.Module, enough: Callable[[str, Merges], bool] | None) -> dict[str, Merges]:
    """By family, the schedule that merges least and is `enough`; families without one are absent. Without `enough` the
    strongest."""
    adapter = adapters.find(model)
    given = (adapter.tokens(model), adapter.prefix(model), len(adapter.blocks(model)))
    if enough is None:
        return {name: family(*given, 1.0) for name, family in FAMILIES.items()}
    found = {name: weakest(family, *given, partial(enough, name)) for name, family in FAMILIES.items()}
    return {name: merges for name, merges in found.items() if merges is not None}


class Judge:
    """How far answers are from the dense model's on calibration images, by the task's own distance (of classifiers the
    KL of the softmaxes, in nats an image).

    Raises:
        ValueError: no images, or answers about every token of an image.
    """

    def __init__(self, task: Task, dense: nn.Module, batches: Sequence[Tensor]) -> None:
        self.task, self.batches = task, batches
        self.images = sum(map(len, batches))
        if not self.images:
            raise ValueError("tokens merge as calibration images say, and there are none")
        self.dense = self._answers(dense)
        if self.dense[0].cls.dim() > 2:
            raise ValueError(
                f"only tokens: the model's answers are {tuple(self.dense[0].cls.shape)}, about every place of an "
                "image, so each of its tokens is needed; leave out tokens"
            )

    @torch.no_grad()
    def _answers(self, model: nn.Module) -> list[adapters.Logits]:
        adapter, device = adapters.find(model), next(model.parameters()).device
        with evaluating(model):
            return [adapter.logits(model, sent(x, device)) for x in self.batches]

    def of(self, model: nn.Module) -> float:
        """The distance of a model, mean over images."""
        pairs = zip(self._answers(model), self.dense, strict=True)
        return float(sum(self.task.distance(ours, dense, 1.0) * len(dense.cls) for ours, dense in pairs)) / self.images


def merge_to(
    model: nn.Module, target: float, batches: Sequence[Tensor], *, dense: nn.Module | None = None, task: str = "auto"
) -> dict[str, Any]:
    """Let tokens of a model merge, in place, until it takes a share of the multiply-accumulates of the dense model.

    Args:
        model: of a family that merges, dense or compact; masked ones are made compact first.
        target: share of `dense`, in (0, 1).
        batches: calibration images, without labels.
        dense: whose work counts as 1, and whose answers are to be kept; the model itself as it is, without it.
        task: what the model is for, see `nvit.tasks`.

    Returns:
        `family` and `merges` of the choice, `ratio` (its share of the work), and by family `distance` to the dense
        model's answers, see `Judge`.

    Raises:
        ValueError: the model cannot merge, its task needs every token, or no schedule is that cheap; the model is left
            as it was.
    """
    if not 0 < target < 1:
        raise ValueError(f"target is {target}; a share of the dense model's work in (0, 1) was expected")
    adapters.merge_(model, ())
    work, whole = work_of(model), work_of(dense or model)(())
    found = schedules(model, lambda _, merges: work(merges) <= target * whole)
    if not found:
        raise ValueError(f"no schedule of merging takes {target:g} of the work; prune widths as well, or ask for more")
    judge = Judge(tasks.of(task, model), dense or model, batches)
    distance = {name: judge.of(adapters.merge_(model, merges)) for name, merges in found.items()}
    best = min(distance, key=distance.__getitem__)
    adapters.merge_(model, found[best])
    return {"family": best, "merges": found[best], "ratio": work(found[best]) / whole, "distance": distance}
