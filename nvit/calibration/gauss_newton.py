"""Samples of the Gauss-Newton matrix of a task's loss between gates."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tasks import Task
from ..utils.finite import Finite
from .capture import Place


class Probes:
    """Sends probes of a task backward, batch by batch.

    Attributes:
        batches: so far.
    """

    def __init__(self, task: Task, device: torch.device, seed: int = 0) -> None:
        self.task, self.generator, self.batches = task, torch.Generator().manual_seed(seed), 0
        self.finite = Finite(
            device, lambda batch, _: f"a logit is not finite on calibration batch {batch}; check weights and data"
        )

    def send(self, logits: Tensor) -> None:
        """Send a probe of the logits `(images, classes)` of a batch backward.

        Raises:
            FloatingPointError: a logit is not finite. Where looking makes the host wait, `check` raises it.
        """
        self.batches += 1
        self.finite.add(self.batches, logits.detach().abs().amax())
        self.finite.check_if_free()
        logits.backward(self.task.probe(logits, self.generator))

    def check(self) -> None:
        """All probes are through.

        Raises:
            FloatingPointError: a logit was not finite; names the batch.
        """
        self.finite.check()


class GateProducts:
    """Σ over images of the products of two gate gradients, the gates of single dims at one place.

    Attributes:
        images: how many.
        sums: `(d, d)` fp64 by place; gates of the stream count at all its places together, under `(group, "emb")`.
    """

    def __init__(self) -> None:
        self.images, self.sums, self._batch = 0, {}, {}

    def add(self, place: Place, products: Tensor) -> None:
        """Activation times gradient of a batch, summed over an image's rows, `(images, d)`.

        A norm that reads several tokens side by side has as many dims for a channel of the stream.
        """
        before = self._batch.get(place, torch.zeros_like(products))
        d = min(before.shape[1], products.shape[1])
        self._batch[place] = sum(p.view(len(p), -1, d).sum(1) for p in (before, products))

    def close_batch(self) -> None:
        """All places of the batch were there."""
        for place, p in self._batch.items():
            self.sums[place] = (self.sums.get(place, 0.0) + p.T @ p).double()
        self.images += max((len(p) for p in self._batch.values()), default=0)
        self._batch.clear()
