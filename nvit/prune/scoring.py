"""Scores of frozen weights: batches forward and backward, within a budget of memory where there is one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .. import parallel
from ..calibration.capture import Place
from ..calibration.statistics import SiteStatistics
from ..criteria.base import Criterion
from ..training.batches import length
from ..training.data import seed_draws, shares
from ..training.distill import sample_labels
from ..utils.progress import Progress, silent
from .budget import Budget
from .plan import Plan

if TYPE_CHECKING:
    from .pruner import Pruner


def batches_to_score(pruner: Pruner, loader) -> int:
    """`score_batches`, or all of one pass, and never more than there are, if the loader says.

    Raises:
        ValueError: it does not, and `score_batches` is not given.
    """
    asked = pruner.config.score_batches
    if asked and not hasattr(loader, "__len__"):
        return asked
    there = length(loader, "to score one pass; set score_batches")
    return min(asked or there, there)


def score(
    pruner: Pruner,
    loader,
    budget: Budget | None = None,
    *,
    statistics: Mapping[Place, SiteStatistics] | None = None,
    progress: Progress = silent,
) -> None:
    """Add one pass over the data (or `score_batches`) to the pruner's saliency; weights stay as they are.

    Criteria that read no weight gradients have the weights frozen meanwhile, which is faster and takes less memory.
    Under a budget a batch may go through the model in parts; its scores are those of the whole batch, up to rounding.

    Args:
        budget: picks how batches are scored; whole, as they come, when None.
        statistics: of the model as it is, where they have been gathered already.

    Raises:
        ValueError: the budget does not hold what is needed.
        FloatingPointError: the loss or a logit is not finite.
    """
    criterion, total = pruner.criterion, batches_to_score(pruner, loader)
    weights = sum(p.numel() * p.element_size() for p in pruner.params.values())
    # A compact model has about its target's share of the weights.
    later = weights * sum(pruner.targets[len(pruner.met) :])
    pruner.stop_recording()
    pruner.call.model.eval()
    try:
        if statistics is not None:
            pruner.start_scoring(statistics)
        if not criterion.wants_images:
            if budget is not None:
                budget.allow(later)
            pruner.score_weights()
            return
        for done, (images, labels) in enumerate(shares(loader), start=1):
            if done == 1 and budget is not None:
                gradients, kept = criterion.capabilities.weight_gradients, criterion.memory(pruner.free)
                plan = budget.choose(
                    pruner.call.model, pruner.free, images.shape, gradients=gradients, statistics=kept, later=later
                )
                progress(0, total, f"budget: {plan}")
            pruner.score(images, labels, None if budget is None else plan)
            progress(done, total, "score")
            if done >= total:
                break
    finally:
        pruner.stop_recording()


@contextmanager
def wanting_gradients(params: Mapping[str, nn.Parameter], wanted: bool) -> Iterator[None]:
    """Inside, all parameters want gradients or none does."""
    before = {name: p.requires_grad for name, p in params.items()}
    try:
        for p in params.values():
            p.requires_grad_(wanted)
        yield
    finally:
        for name, p in params.items():
            p.requires_grad_(before[name])


@dataclass(frozen=True)
class LabelLoss:
    """Cross entropy of a part of a batch, with its labels or with labels drawn from the model's own softmax.

    Attributes:
        labels: of this part; None where they are drawn.
        places: of this part's images in the batch.
        batch: images in the batch, of all parts and ranks.
        number: of the batch, for messages and with `seed` for draws.
    """

    labels: Tensor | None
    places: list[int]
    batch: int
    number: int
    seed: int

    def __call__(self, logits: Tensor) -> Tensor:
        """The loss of this part's logits, as much of the batch's mean as it has of its images.

        Parts add up to the mean over this rank's images, and the mean over ranks is then the batch's.

        Raises:
            FloatingPointError: it is not finite, on whichever rank.
        """
        seed_draws(self.seed, 2**31 + self.number)
        if self.labels is None:
            target = sample_labels(logits, self.places if len(logits) < self.batch else (), self.batch)
        else:
            target = self.labels.to(logits.device)
        ranks = parallel.world()
        loss = nn.functional.cross_entropy(logits, target) * (len(logits) * ranks / self.batch)
        (whole,) = parallel.sums([loss.detach() / ranks], logits.device)
        if not math.isfinite(whole):
            raise FloatingPointError(f"the loss is {whole} on scoring batch {self.number}; check the data")
        return loss


def backward(
    call: nn.Module, criterion: Criterion, images: Tensor, labels: Tensor | None, plan: Plan, seed: int
) -> None:
    """One batch forward through `call`, and backward what the criterion reads, in the parts of `plan`.

    Args:
        images, labels: this rank's share of the batch; without ranks, all of it. Labels are drawn where None.
    """
    device = next(call.model.parameters()).device
    (batch,) = map(int, parallel.sums([len(images)], device))
    places, number = parallel.share(batch), criterion.batches + 1
    for part in plan.parts(len(images)):
        with plan.running(call.model):
            logits = call(images[part].to(device)).mean
        loss = LabelLoss(None if labels is None else labels[part], places[part], batch, number, seed)
        criterion.backward(logits.float() if plan.bf16 else logits, loss)
