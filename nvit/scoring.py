"""Scores of frozen weights: one pass over the data, within a budget of memory where there is one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import adapters
from .budget import Budget, Plan
from .data import seed_draws
from .distill import sample_labels
from .progress import Progress, silent


def score(pruner, loader, budget: Budget | None = None, *, progress: Progress = silent) -> None:
    """Add one pass over the data (or `score_batches`) to the pruner's saliency; weights stay as they are.

    Cross entropy with the labels, or with labels drawn from the model's own softmax. Criteria that read gates alone
    need no weight gradients: the weights are frozen meanwhile, which is faster and takes less memory. Under a budget a
    batch may go through the model in parts; its scores are those of the whole batch, up to rounding.

    Args:
        pruner: a `Pruner`.
        budget: picks how batches are scored; whole, as they come, when None.

    Raises:
        ValueError: the budget does not hold what is needed.
        FloatingPointError: the loss is not finite.
    """
    config, model = pruner.config, pruner.model
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
    total = min(config.score_batches or len(loader), len(loader))
    try:
        for p in pruner.params.values():
            p.requires_grad_(not frozen_route)
        for done, (images, labels) in enumerate(loader, start=1):
            if plan is None:
                plan = budget.choose(model, pruner.free, images.shape, gradients=not frozen_route, later=later)
                progress(0, total, f"budget: {plan}")
            if frozen_route and pruner.gates is None:
                pruner._record_gates()
            pruner.observe(gates=_backward(pruner, plan, images, labels, done))
            model.zero_grad(set_to_none=True)
            progress(done, total, "score")
            if done >= total:
                break
    finally:
        pruner.stop_recording()
        for name, p in pruner.params.items():
            p.requires_grad_(trainable[name])


def _backward(pruner, plan: Plan, images: Tensor, labels: Tensor, number: int) -> dict[str, Tensor] | None:
    """Gradients of one batch's loss, part by part; its gate gradients `(batch, group.size)` where they are recorded."""
    config, model, batch, recorded = pruner.config, pruner.model, len(images), []
    adapter, device = adapters.find(model), next(model.parameters()).device
    for part in plan.parts(batch):
        seed_draws(config.seed, 2**31 + number)
        with plan.running(model):
            cls, dist = adapter.logits(model, images[part].to(device))
        logits = cls if dist is None else (cls + dist) / 2
        logits = logits.float() if plan.bf16 else logits
        rows = range(batch)[part] if len(logits) < batch else ()
        target = labels[part].to(device) if config.labels == "true" else sample_labels(logits, rows, batch)
        loss = nn.functional.cross_entropy(logits, target)
        if not bool(torch.isfinite(loss.detach())):
            raise FloatingPointError(f"the loss is {float(loss.detach())} on scoring batch {number}; check the data")
        # A part's mean counts as much as it has images, so that the parts add up to the batch's mean.
        (loss * (len(logits) / batch)).backward()
        if pruner.gates is not None:
            recorded.append(pruner.gates.pop())
    return {name: torch.cat([r[name] for r in recorded]) for name in recorded[0]} if recorded else None
