"""A run in limited memory: from a budget to the first plan that fits, rehearsed on fake tensors before any computing.

Plans come in the order of what they cost: no weight gradients (where the criterion reads none), the blocks' activations
computed again in the backward pass, part of a batch at a time, activations in bfloat16. Weights are never rounded:
under bfloat16 they stay as they are and each layer casts them as it goes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..spec import Group
from ..tasks import Task
from ..utils.memory import Meter, keep_freed_memory
from .plan import Plan
from .rehearse import most_images, rehearse_forward, rehearse_scoring

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
        task: Task | None = None,
    ) -> Plan:
        """The first plan that fits, for batches shaped `images`.

        Args:
            gradients: the criterion reads weight gradients.
            statistics: bytes in which it sums up what batches say.
            later: bytes that compact models will take once scoring is over.
            task: whose loss; the one that the model tells if None.

        Raises:
            ValueError: not even the smallest plan fits; says what would.
        """
        batch, *size = images
        held = self.meter.held
        # Gate gradients of the whole batch, once as they come, once spread over pruned units, once together.
        gates = 0 if gradients else 3 * 4 * batch * sum(g.size for g in groups)

        def total(plan: Plan, count: int) -> float:
            scoring = rehearse_scoring(model, groups, size, count, plan, task) * _SLACK + gates
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
