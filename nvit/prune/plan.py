"""How a batch is scored: whole or in parts, with activations kept, computed again or in bfloat16."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import adapters
from ..calibration.stand_in import standing_in


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
