"""Scores of frozen weights: one pass over the data, within a budget of memory where there is one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import parallel
from ..training.data import seed_draws, shares
from ..training.distill import sample_labels
from ..utils.progress import Progress, silent
from .budget import Budget, Plan
from .pruner import Pruner


def batches_to_score(pruner: Pruner, loader) -> int:
    """`score_batches`, or all of one pass, and never more than there are."""
    return min(pruner.config.score_batches or len(loader), len(loader))


def score(pruner: Pruner, loader, budget: Budget | None = None, *, progress: Progress = silent) -> None:
    """Add one pass over the data (or `score_batches`) to the pruner's saliency; weights stay as they are.

    Cross entropy with the labels, or with labels drawn from the model's own softmax. Criteria that read gates alone
    need no weight gradients: the weights are frozen meanwhile, which is faster and takes less memory. Under a budget a
    batch may go through the model in parts; its scores are those of the whole batch, up to rounding.

    Args:
        budget: picks how batches are scored; whole, as they come, when None.

    Raises:
        ValueError: the budget does not hold what is needed.
        FloatingPointError: the loss is not finite.
    """
    model = pruner.call.model
    reads = pruner.criterion.reads
    weights = sum(p.numel() * p.element_size() for p in pruner.params.values())
    # A compact model has about its target's share of the weights.
    later = weights * sum(pruner.targets[len(pruner.met) :])
    if reads == "nothing":
        if budget is not None:
            budget.allow(later)
        pruner.observe({})
        return
    frozen_route = reads in ("gates", "either")
    trainable = {name: p.requires_grad for name, p in pruner.params.items()}
    plan = Plan(weight_gradients=not frozen_route) if budget is None else None
    model.eval()
    total = batches_to_score(pruner, loader)
    try:
        for p in pruner.params.values():
            p.requires_grad_(not frozen_route)
        for done, (images, labels) in enumerate(shares(loader), start=1):
            if plan is None:
                needs = {"gradients": not frozen_route, "statistics": pruner.criterion.memory(pruner.free)}
                plan = budget.choose(model, pruner.free, images.shape, **needs, later=later)
                progress(0, total, f"budget: {plan}")
            if frozen_route and pruner.gates is None:
                pruner.start_recording()
            gates = _backward(pruner, plan, images, labels, done)
            grads = {name: p.grad for name, p in pruner.params.items() if p.grad is not None}
            # Shards hold the mean over ranks already.
            pruner.observe(grads if model is not pruner.model else parallel.mean(grads), gates)
            model.zero_grad(set_to_none=True)
            progress(done, total, "score")
            if done >= total:
                break
    finally:
        pruner.stop_recording()
        for name, p in pruner.params.items():
            p.requires_grad_(trainable[name])


def _backward(pruner: Pruner, plan: Plan, images: Tensor, labels: Tensor, number: int) -> dict[str, Tensor] | None:
    """Gradients of one batch's loss, part by part; its gate gradients `(images, group.size)` where they are recorded.

    `images` are this rank's share of the batch; without ranks, all of it.
    """
    config, model, recorded = pruner.config, pruner.call.model, []
    device, ranks = next(model.parameters()).device, parallel.world()
    (batch,) = map(int, parallel.sums([len(images)], device))
    places = parallel.share(batch)
    for part in plan.parts(len(images)):
        seed_draws(config.seed, 2**31 + number)
        with plan.running(model):
            logits = pruner.call(images[part].to(device)).mean
        logits = logits.float() if plan.bf16 else logits
        rows = places[part] if len(logits) < batch else ()
        target = labels[part].to(device) if config.labels == "true" else sample_labels(logits, rows, batch)
        # A part counts as much as it has images, so that parts, and the mean over ranks, make the batch's mean.
        loss = nn.functional.cross_entropy(logits, target) * (len(logits) * ranks / batch)
        (whole,) = parallel.sums([loss.detach() / ranks], device)
        if not math.isfinite(whole):
            raise FloatingPointError(f"the loss is {whole} on scoring batch {number}; check the data")
        loss.backward()
        if pruner.gates is not None:
            recorded.append(pruner.gates.pop())
    return {name: torch.cat([r[name] for r in recorded]) for name in recorded[0]} if recorded else None
