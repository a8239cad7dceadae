"""Scores of frozen weights: batches forward and backward, within a budget of memory where there is one."""

from __future__ import annotations

from collections.abc import Mapping

from ..calibration.capture import Place
from ..calibration.statistics import SiteStatistics
from ..training.data import shares
from ..utils.progress import Progress, silent
from .budget import Budget
from .pruner import Pruner
from .sample import count_batches, sampled


def score(
    pruner: Pruner,
    loader,
    budget: Budget | None = None,
    *,
    statistics: Mapping[Place, SiteStatistics] | None = None,
    progress: Progress = silent,
) -> None:
    """Add the calibration images of a run to the pruner's saliency; weights stay as they are.

    Criteria that read no weight gradients have the weights frozen meanwhile, which is faster and takes less memory.
    Under a budget a batch may go through the model in parts; its scores are those of the whole batch, up to rounding.

    Args:
        budget: picks how batches are scored; whole, as they come, when None.
        statistics: of the model as it is, where they have been gathered already.

    Raises:
        ValueError: the budget does not hold what is needed.
        FloatingPointError: the loss or a logit is not finite.
    """
    criterion, total = pruner.criterion, count_batches(loader, pruner.config)
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
        for done, (images, labels) in enumerate(shares(loader, sampled(loader, pruner.config)), start=1):
            if done == 1 and budget is not None:
                gradients, kept = criterion.capabilities.weight_gradients, criterion.memory(pruner.free)
                plan = budget.choose(
                    pruner.call.model,
                    pruner.free,
                    images.shape,
                    gradients=gradients,
                    statistics=kept,
                    later=later,
                    task=pruner.task,
                )
                progress(0, total, f"budget: {plan}")
            pruner.score(images, labels, None if budget is None else plan)
            progress(done, total, "score")
    finally:
        pruner.stop_recording()
