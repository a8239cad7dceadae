"""A tower without a head: its normalised features are to stay what they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..adapters.base import Logits
from .base import Meter, Task, rows_of, signs


class Features(Task):
    """A tower without a head, as it hands out its features `(batch, width)`, or `(batch, tokens, width)`.

    The loss is the squared distance of features of length 1 (two less twice their cosine). There are no labels: what
    stands in their place are the features of the unpruned model.
    """

    name, metric, reads_labels = "features", "cosine", False
    own = ("features", "keep_output")

    def check(self, config: Any) -> None:
        super().check(config)
        if config.features == "tokens" and getattr(config, "merges_tokens", False):
            raise ValueError(
                "only tokens: features tokens is about each of them; take --features class or pooled, or leave out "
                "tokens (--only widths)"
            )
        if getattr(config, "keep_output", False) and not config.refit:
            raise ValueError("keep_output is fitted by a refit; add --refit (refit = true)")
        if getattr(config, "train", False):
            raise ValueError(
                "task features has no labels, and the unpruned model's features have no gradient before something has "
                "changed: prune with --no-train (train = false), then finetune the snapshot"
            )
        if not config.distill_weight and not hasattr(config, "train"):
            raise ValueError("task features trains towards the unpruned model alone; distill_weight must not be 0")

    def labels(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Nothing is read: an empty row an image, whatever came with it."""
        return images.new_zeros(len(images), 0)

    def loss(self, student: Logits, labels: Tensor) -> Tensor:
        """Squared distance to features of any length, mean over tokens; 0 where there are none to compare with."""
        own = normalize(student.mean, dim=-1)
        if not labels.shape[-1]:
            return own.sum() * 0.0
        return (own - normalize(labels.to(own.dtype), dim=-1)).square().sum(-1).mean()

    def distance(self, student: Logits, teacher: Logits, tau: float) -> Tensor:
        return self.loss(student, teacher.mean)

    def draw(self, outputs: Tensor, rows: Sequence[int] = (), batch: int = 0) -> Tensor:
        """The normalised features with a noise of length about 1, fp32."""
        own = normalize(outputs.detach().float(), dim=-1)
        noise = own.new_empty(batch if rows else len(own), *own.shape[1:]).normal_()
        return own + rows_of(noise, rows) / math.sqrt(own.shape[-1])

    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """The Hessian is 2 Jᵀ J, J = (1 - n nᵀ) / length the Jacobian of the normalised features n; of several tokens,
        over their number."""
        outputs_ = outputs.detach().float()
        n, length = normalize(outputs_, dim=-1), outputs_.norm(dim=-1, keepdim=True)
        noise = signs(n, generator)
        share = math.sqrt(2 * len(n) * n.shape[-1] / n.numel())
        return (share * (noise - n * (n * noise).sum(-1, keepdim=True)) / length.clamp(min=1e-12)).to(outputs)

    def meter(self) -> Meter:
        return Cosine()


class Cosine(Meter):
    """Mean cosine to the unpruned model's features.

    Raises:
        ValueError: in `add`, features of other widths or images.
    """

    def __init__(self) -> None:
        self.total, self.images = 0.0, 0

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        if outputs.shape != labels.shape:
            raise ValueError(
                f"features are {tuple(outputs.shape)} and the reference's {tuple(labels.shape)}; only features of one "
                "width can be compared: prune with --keep-output, or leave the stream alone"
            )
        self.total += float(torch.cosine_similarity(outputs.double(), labels.double(), dim=-1).sum())
        self.images += outputs.numel() // outputs.shape[-1]

    def value(self) -> dict[str, float]:
        return {"cosine": self.total / self.images}
