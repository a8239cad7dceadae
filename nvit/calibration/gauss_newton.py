"""Samples of the Gauss-Newton matrix of cross entropy: probes of the logits, and products of the gate gradients that
they cause."""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.devices import sent
from ..utils.finite import Finite
from .capture import Place


def probe(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A draw `(batch, classes)` whose second moment is the Hessian of cross entropy at `logits` `(batch, classes)`.

    It does not depend on the labels. Sent backward, it gives gradients whose second moments are Gauss-Newton's.
    """
    p = logits.detach().float().softmax(-1)
    # Drawn on the CPU, so that a seed gives the same on every device.
    signs = sent(torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8), p.device) * 2 - 1
    half = p.sqrt() * signs
    return (half - p * half.sum(-1, keepdim=True)).to(logits)


class Probes:
    """Sends probes backward, batch by batch.

    Attributes:
        batches: so far.
    """

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.generator, self.batches = torch.Generator().manual_seed(seed), 0
        self.finite = Finite(
            device, lambda batch, _: f"a logit is not finite on calibration batch {batch}; check weights and data"
        )

    def send(self, logits: Tensor) -> None:
        """Send a probe of the logits `(images, classes)` of a batch backward.

        Raises:
            FloatingPointError: a logit is not finite. Where looking makes the host wait, `check` raises it.
        """
        self.finite.add(self.batches + 1, logits.detach().abs().amax())
        self.finite.check_if_free(forget=True)
        logits.backward(probe(logits, self.generator))
        self.batches += 1

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
