"""A run in limited memory: from a budget to the first plan that fits, rehearsed on fake tensors before any computing.

Plans come in the order of what they cost: no weight gradients (where the criterion reads none), the blocks' activations
computed again in the backward pass, part of a batch at a time, activations in bfloat16. Weights are never rounded:
under bfloat16 they stay as they are and each layer casts them as it goes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from .. import adapters
from ..calibration.stand_in import standing_in
from ..criteria.gates import GateRecorder
from ..spec import Group
from ..structure.masks import full_masks
from ..training.distill import cnn_loss
from ..utils.memory import LiveBytes, Meter, keep_freed_memory

_SCALES = {"k": 1, "m": 2, "g": 3, "t": 4}
_SLACK, _FIRST_USE = 1.05, 64 * 2**20
"""What operations take inside themselves, over the tensors they return; what libraries load when first used."""


def parse(text: str) -> int:
    """Bytes of a budget such as 8GB, 500MB or 20 GiB; GB are 10⁹ bytes, GiB 2³⁰.

    Raises:
        ValueError: not a positive amount with its unit.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmgt])(i?)b?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"budget {text!r} is not an amount of memory; give it as 8GB, 500MB or 20GiB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _SCALES[found[2].lower()])


def show(count: float) -> str:
    """Bytes for people: 7.31 GB."""
    power = min(4, max(2, int(math.log10(max(count, 1)) // 3)))
    return f"{count / 1000**power:.3g} {' KMGT'[power]}B"


@dataclass(frozen=True)
class Plan:
    """How a batch is scored.

    Attributes:
        images: so many at a time, the scores still those of the whole batch; all of them when 0.
        checkpoint: blocks keep their input alone and compute their activations again in the backward pass.
        bf16: activations in bfloat16, sums in fp32.
        weight_gradients: the criterion reads them.
    """

    images: int = 0
    checkpoint: bool = False
    bf16: bool = False
    weight_gradients: bool = False

    def parts(self, batch: int) -> list[slice]:
        """A batch of `batch` images in parts as even as can be."""
        count = max(1, -(-batch // (self.images or max(1, batch))))
        ends = [batch * i // count for i in range(count + 1)]
        return [slice(*pair) for pair in itertools.pairwise(ends)]

    @contextlib.contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Forward passes inside follow the plan; the backward pass may come later."""
        with contextlib.ExitStack() as inside:
            if self.checkpoint:
                blocks = adapters.of(model).blocks(model)
                inside.enter_context(standing_in(model, {block: _Checkpointed(block) for block in blocks}))
            if self.bf16:
                inside.enter_context(torch.autocast(next(model.parameters()).device.type, torch.bfloat16))
            yield

    def __str__(self) -> str:
        picked = [
            "with weight gradients" if self.weight_gradients else "without weight gradients",
            "activation checkpointing" * self.checkpoint,
            f"{self.images} image{'s' * (self.images > 1)} at a time" if self.images else "whole batches",
            "bf16 activations" * self.bf16,
        ]
        return ", ".join(p for p in picked if p)


class _Checkpointed(nn.Module):
    """A block that keeps its input alone and computes its activations again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _fake_twin(mode: FakeTensorMode, model: nn.Module, weight_gradients: bool) -> nn.Module:
    fakes = {id(b): mode.from_tensor(b) for b in model.buffers()}
    for p in model.parameters():
        fakes[id(p)] = nn.Parameter(mode.from_tensor(p.detach()), requires_grad=weight_gradients)
    return copy.deepcopy(model, fakes)


def rehearse_scoring(model: nn.Module, groups: Sequence[Group], size: Sequence[int], images: int, plan: Plan) -> int:
    """Bytes that scoring `images` images of `size` at once adds to what is held, at most; nothing is computed."""
    device = next(model.parameters()).device
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        twin = _fake_twin(mode, model, plan.weight_gradients)
        taps = contextlib.nullcontext() if plan.weight_gradients else GateRecorder(twin, groups, full_masks(groups))
        with LiveBytes(twin.parameters()) as counted, taps:
            x = torch.empty(images, *size, device=device, dtype=next(model.parameters()).dtype)
            labels = torch.zeros(images, dtype=torch.long, device=device)
            with plan.running(twin):
                logits = adapters.of(twin).logits(twin, x)
            cnn_loss(logits, labels, None).backward()
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


class Budget:
    """The memory of a run: what is allowed, the plan that was picked, the most that was held.

    Attributes:
        allowed: bytes; on a CPU resident in this process, on CUDA allocated.
        plan: the last one picked.
        estimate: bytes it was expected to take, everything included.
    """

    def __init__(self, allowed: str, device: torch.device | str, meter: Meter | None = None) -> None:
        self.allowed = parse(allowed)
        if meter is None:
            meter = Meter(device)
        else:  # it goes on with the peak it has
            meter.trim()
        self.meter = meter
        self.plan, self.estimate = Plan(), 0
        if self.meter.device.type == "cpu":
            keep_freed_memory(False)

    def forward_images(self, model: nn.Module, size: Sequence[int], most: int, compact: float) -> int:
        """The most images up to `most` of which a forward pass fits, beside compact models with `compact` times the
        weights; 0 where not even one does."""
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        room = self.allowed - self.meter.held - compact * weights - _FIRST_USE
        return most_images(room, most, lambda images: rehearse_forward(model, size, images) * _SLACK)

    def choose(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        images: Sequence[int],
        *,
        gradients: bool,
        statistics: int,
        later: float,
    ) -> Plan:
        """The first plan that fits, for batches shaped `images`.

        Args:
            gradients: the criterion reads weight gradients.
            statistics: bytes in which it sums up what batches say.
            later: bytes that compact models will take once scoring is over.

        Raises:
            ValueError: not even the smallest plan fits; says what would.
        """
        batch, *size = images
        held = self.meter.held
        # Gate gradients of the whole batch, once as they come, once spread over pruned units, once together.
        gates = 0 if gradients else 3 * 4 * batch * sum(g.size for g in groups)

        def total(plan: Plan, count: int) -> float:
            scoring = rehearse_scoring(model, groups, size, count, plan) * _SLACK + gates
            return held + statistics + max(scoring, later) + _FIRST_USE

        plan = Plan(weight_gradients=gradients)
        least = math.inf
        for changes in ({}, {"checkpoint": True}, {"images": 1}, {"bf16": True}):
            plan = replace(plan, **changes)
            need = functools.cache(functools.partial(total, plan))
            if plan.images:
                count = most_images(self.allowed, max(1, batch - 1), need)
                plan = replace(plan, images=count or 1)
                least = min(least, need(1))
            else:
                count = batch if need(batch) <= self.allowed else 0
                least = min(least, need(batch))
            if count:
                self.plan, self.estimate = plan, int(need(count))
                return plan
        raise self._too_small(least, held, later, statistics)

    def allow(self, later: float) -> None:
        """Refuse what `choose` would, where nothing has to be computed for the scores."""
        held = self.meter.held
        self.estimate = int(held + later + _FIRST_USE)
        if self.estimate > self.allowed:
            raise self._too_small(self.estimate, held, later)

    def _too_small(self, least: float, held: int, later: float, statistics: int = 0) -> ValueError:
        lean = (
            f"; of these {show(statistics)} go with the criterion, hessian has hardly any" if statistics > 2**24 else ""
        )
        return ValueError(
            f"budget {show(self.allowed)} is too small: at least {show(least)} are needed; {show(held)} are held "
            f"already, weights included, and compact models will take about {show(later)}. Raise it, or ask for fewer "
            f"or lower targets{lean}"
        )

    def report(self) -> dict[str, Any]:
        """For `result.json`: bytes allowed, expected and found, and what was picked."""
        return {
            "budget": self.allowed,
            "picked": str(self.plan),
            "estimate": self.estimate,
            "peak": self.meter.peak,
        }
