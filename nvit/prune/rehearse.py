"""What scoring and forward passes will hold, found out on fake tensors before any computing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import adapters, tasks
from ..criteria.gates import GateRecorder
from ..spec import Group
from ..structure.masks import full_masks
from ..tasks import Task
from ..utils.memory import LiveBytes
from .plan import Plan


def _fake_twin(mode: FakeTensorMode, model: nn.Module, weight_gradients: bool) -> nn.Module:
    fakes = {id(b): mode.from_tensor(b) for b in model.buffers()}
    for p in model.parameters():
        fakes[id(p)] = nn.Parameter(mode.from_tensor(p.detach()), requires_grad=weight_gradients)
    return copy.deepcopy(model, fakes)


def rehearse_scoring(
    model: nn.Module,
    groups: Sequence[Group],
    size: Sequence[int],
    images: int,
    plan: Plan,
    task: Task | None = None,
) -> int:
    """Bytes that scoring `images` images of `size` at once adds to what is held, at most; nothing is computed."""
    device, task = next(model.parameters()).device, task or tasks.of("auto", model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        twin = _fake_twin(mode, model, plan.weight_gradients)
        taps = contextlib.nullcontext() if plan.weight_gradients else GateRecorder(twin, groups, full_masks(groups))
        with LiveBytes(twin.parameters()) as counted, taps:
            x = torch.empty(images, *size, device=device, dtype=next(model.parameters()).dtype)
            with plan.running(twin):
                logits = adapters.of(twin).logits(twin, x)
            task.loss(logits, task.draw(logits.mean)).backward()
    return counted.peak


def rehearse_forward(model: nn.Module, size: Sequence[int], images: int) -> int:
    """Bytes that a forward pass of `images` images without gradients adds, at most; nothing is computed."""
    p = next(model.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        twin = _fake_twin(mode, model, False)
        with LiveBytes(twin.parameters()) as counted:
            twin(torch.empty(images, *size, device=p.device, dtype=p.dtype))
    return counted.peak


def most_images(room: float, most: int, need: Callable[[int], float]) -> int:
    """The largest count up to `most` whose `need` is within `room`; 0 where not even one is.

    Need grows in proportion from one image to two, so that few counts have to be tried.
    """
    one = need(1)
    if one > room:
        return 0
    slope = need(2) - one if most > 1 else 0
    count = most if slope <= 0 else min(most, 1 + int((room - one) / slope))
    while count > 1 and need(count) > room:
        count -= 1
    return count
