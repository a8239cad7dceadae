"""A few hundred steps towards the dense model's features, once a refit has done what closed form can (`polish`).

All tokens behind the last norm are to be met, not the answers alone: a few hundred images say little by their answers
(trained towards these, models came nearer on the images that trained and went away on others), much by their tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .. import adapters, tasks
from ..config import PruneConfig
from ..parallel import Call
from ..structure.verify import evaluating
from ..tasks import Task
from ..tasks.nearness import Nearness
from ..training.batches import images_of
from ..training.optimizer import fused_adamw, set_rates
from ..training.step import Step
from ..utils.devices import sent
from ..utils.logs import Log, unlogged
from ..utils.progress import Progress, silent
from .folder import RunFolder
from .result import Pruned
from .sample import fitted, fitted_count, held_back

RATE, WARM = 2e-5, 0.1
"""Of AdamW, after a share of the steps in which it comes up; a cosine takes it to nothing."""

BATCH = 16
"""Images a step, at most."""

LEADING = 0.1
"""What leading tokens count, as a share of all others together."""

LOOK = 25
"""Steps between two looks at the images held back."""

ZOOM = 0.8
"""Least share of an image's area that an augmented one shows."""


class Towards:
    """The loss of a step: squared difference of all tokens behind the last norm to the dense model's, over their mean
    square; leading tokens, which answers are read from, count `LEADING` as much as all others together. Where widths of
    the streams differ, the task's distance of the answers.

    Attributes:
        call: gives of a model and images what is to be met.
    """

    def __init__(self, task: Task, model: nn.Module, dense: nn.Module, images: Tensor) -> None:
        self.task, self.dense, adapter = task, dense, adapters.find(dense)
        with torch.no_grad(), evaluating(model), evaluating(dense):
            shapes = {adapter.token_stream(m, images[:1]).shape for m in (model, dense)}
        self.tokens = len(shapes) == 1
        self.call = adapter.token_stream if self.tokens else adapter.logits
        if self.tokens:
            count, leading = next(iter(shapes))[1], adapter.leading(dense)
            self.weights = images.new_ones(count)
            self.weights[:leading] = LEADING * (count - leading) / max(1, leading)
            self.weights /= self.weights.mean()

    def of_logits(self, student: Any, images: Tensor, _) -> Tensor:
        """Of what `call` gave of the student."""
        with torch.no_grad():
            wanted = self.call(self.dense, images)
        if not self.tokens:
            return self.task.distance(student, wanted, 1.0)
        off = (student.float() - wanted.float()).square().mean(-1) * self.weights
        return off.mean() / wanted.float().square().mean()


def polish_snapshots(
    snapshots: list[Pruned],
    dense: nn.Module,
    loader,
    config: PruneConfig,
    folder: RunFolder,
    progress: Progress = silent,
    log: Log = unlogged,
) -> list[dict[str, Any]]:
    """Polish every snapshot in place and write it again; those that an interrupted run has polished stay as they are.

    Returns:
        A row for the history of each that was polished now.
    """
    rows = []
    for pruned in snapshots:
        if pruned.metrics.get("polished_steps") == config.polish:
            continue

        def told(step: int, values: dict[str, Any], at: float = pruned.target) -> None:
            log(f"polish_{at:g}", step, values)

        found = polish_(pruned.model, dense, loader, config, progress, told)
        pruned.metrics |= {"polished_steps": config.polish}
        folder.save(pruned)
        rows.append({"target": pruned.target, "predicted_ratio": pruned.predicted_ratio} | found)
    return rows


def polish_(
    model: nn.Module, dense: nn.Module, loader, config: PruneConfig, progress: Progress = silent, told=None
) -> dict[str, Any]:
    """Train a compact model towards the dense one's tokens for `config.polish` steps, in place; no label is read.

    The calibration images train it, flipped and zoomed into at random. Those that a refit holds back are looked at now
    and then, and the weights whose answers were nearest on them stay, the first ones if none were nearer.

    Returns:
        `polish_seconds`; `polish_before` and `polish_after`, the task's distance to the dense model on the images held
        back; `polish_best`, the step whose weights stayed.

    Raises:
        ValueError: no images are left to train on or to hold back.
        FloatingPointError: the loss or a gradient is not finite.
    """
    start, task = time.monotonic(), tasks.settled(config, model)
    adapters.find(model).prepare(model)
    count = fitted_count(loader, config)
    near = Nearness(task, dense, held_back(loader, config, count))
    first = next(images_of(fitted(loader, config, count)), None)
    if first is None:
        raise ValueError("polish trains on calibration images that are not held back: there are none; give more")
    state = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(state.values(), lr=RATE, weight_decay=0.0)
    fused_adamw(optimizer)
    towards = Towards(task, model, dense, sent(first, next(iter(state.values())).device))
    step = Step(Call(model, towards.call), towards, optimizer, clip=1.0)  # bf16 loses what such small steps gain
    before = best = near.of(model)
    kept, at = {n: p.detach().clone() for n, p in state.items()}, 0
    model.eval()  # neither dropout nor drop path: the dense answers are to be met as they are
    for done, images in enumerate(_augmented(loader, config, count, step.device), 1):
        set_rates(optimizer, [rate_at(done, config.polish)])
        step(images, None)
        if done % LOOK == 0 or done == config.polish:
            loss, distance = step.look(), near.of(model)
            if distance < best:
                best, at = distance, done
                kept = {n: p.detach().clone() for n, p in state.items()}
            progress(done, config.polish, f"polish: {distance:.4f} from dense")
            if told is not None:
                told(done, {"loss": loss, "distance": distance})
        if done == config.polish:
            break
    with torch.no_grad():
        for n, p in state.items():
            p.copy_(kept[n])
            p.grad = None
    took = time.monotonic() - start
    return {"polish_seconds": took, "polish_before": before, "polish_after": best, "polish_best": at}


def rate_at(step: int, steps: int) -> float:
    """Of a step, counted from 1."""
    warm = max(1.0, WARM * steps)
    left = max(0.0, step - warm) / max(1.0, steps - warm)
    return RATE * min(step / warm, 0.5 * (1 + math.cos(math.pi * left)))


def _augmented(loader, config: PruneConfig, count: int, device: torch.device) -> Iterator[Tensor]:
    """Batches of at most `BATCH` of the calibration images that are not held back, over and over, each time anew."""
    draw = torch.Generator().manual_seed(config.seed)
    while True:
        for images in images_of(fitted(loader, config, count)):
            for x in images.split(BATCH):
                yield zoomed(sent(x, device), draw)


def zoomed(images: Tensor, draw: torch.Generator) -> Tensor:
    """Images `(batch, 3, height, width)` of which each shows a random part, of its own proportions, in the size of the
    whole, half of them mirrored."""
    height, width = images.shape[-2:]
    found = []
    for x in images:
        share = math.sqrt(ZOOM + (1 - ZOOM) * float(torch.rand((), generator=draw)))
        h, w = max(1, round(share * height)), max(1, round(share * width))
        top, left = (int(float(torch.rand((), generator=draw)) * (n + 1)) for n in (height - h, width - w))
        part = x[None, :, top : top + h, left : left + w]
        part = interpolate(part, (height, width), mode="bilinear", align_corners=False, antialias=True)
        found.append(part.flip(-1) if float(torch.rand((), generator=draw)) < 0.5 else part)
    return torch.cat(found)
