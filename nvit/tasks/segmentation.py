"""A class for every pixel: softmax and cross entropy pixel by pixel (the paper's Sec. 4.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.base import Logits
from .base import Meter, Task, rows_of, signs

IGNORE = 255
"""The label of pixels that count for nothing."""


class Segmentation(Task):
    """A class for every pixel.

    Labels are class numbers int64 `(batch, height, width)`, `IGNORE` where there is none; outputs are
    `(batch, classes, height, width)`. Losses are means over an image's pixels, then over images, so that parts of a
    batch add up to the batch.
    """

    name, metric, every_token = "segmentation", "miou", True

    def check(self, config: Any) -> None:
        super().check(config)
        for field in ("auto_augment", "erasing"):
            if getattr(config, field):
                raise ValueError(
                    f"{field} changes images without their labels; task {self.name} crops and flips both, and takes "
                    "color_jitter"
                )

    def labels(self, images: Tensor, labels: Tensor | None) -> Tensor:
        labels = self.given(labels)
        if labels.shape != (len(images), *images.shape[-2:]) or labels.is_floating_point():
            raise ValueError(
                f"labels are {str(labels.dtype).removeprefix('torch.')} {tuple(labels.shape)}; task segmentation "
                f"expects a class number for every pixel, int64 {(len(images), *images.shape[-2:])}"
            )
        labels = labels.long()
        if labels.device.type == "cpu":
            odd = labels[(labels != IGNORE) & ((labels < 0) | (labels >= (self.outputs or IGNORE)))]
            if odd.numel():
                raise ValueError(
                    f"a pixel's label is {int(odd[0])}, but the model has {self.outputs} classes, counted from 0, and "
                    f"{IGNORE} for none; name a number without a class with --ignore-label"
                )
        return labels

    def loss(self, student: Logits, labels: Tensor) -> Tensor:
        """An image without a labelled pixel counts as 0."""
        each = F.cross_entropy(student.mean, labels, ignore_index=IGNORE, reduction="none").flatten(1).sum(1)
        return (each / (labels != IGNORE).flatten(1).sum(1).clamp(min=1)).mean()

    def distance(self, student: Logits, teacher: Logits, tau: float) -> Tensor:
        """KL(teacher ‖ student) of every pixel's classes softened by `tau`, mean over pixels and images."""
        s, t = (F.log_softmax(x.mean / tau, 1) for x in (student, teacher))
        return (t.exp() * (t - s)).sum(1).mean()

    def draw(self, outputs: Tensor, rows: Sequence[int] = (), batch: int = 0) -> Tensor:
        """From every pixel's softmax, int64 `(batch, height, width)`."""
        p = outputs.detach().float().softmax(1)
        draws = p.new_empty(batch if rows else len(p), *p.shape[1:]).exponential_()
        return (p / rows_of(draws, rows)).argmax(1)

    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """The Hessian is diag(p) - p pᵀ in every pixel, over their number."""
        p = outputs.detach().float().softmax(1)
        half = p.sqrt() * signs(p, generator)
        pixels = math.prod(p.shape[2:])
        return ((half - p * half.sum(1, keepdim=True)) / math.sqrt(pixels)).to(outputs)

    def meter(self) -> Meter:
        return Overlap(self.outputs)


class Overlap(Meter):
    """Mean intersection over union of the classes that occur, in labels or answers, and right pixels, both in percent
    (torchmetrics), and mean cross entropy; ignored pixels are left out of all three."""

    def __init__(self, classes: int) -> None:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

        more = {"ignore_index": IGNORE, "validate_args": False}
        self.union = MulticlassJaccardIndex(classes, **more)
        self.right = MulticlassAccuracy(classes, average="micro", **more)
        self.entropy, self.pixels = 0.0, 0

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        answers, labels_ = outputs.argmax(1).cpu(), labels.cpu()
        self.union.update(answers, labels_)
        self.right.update(answers, labels_)
        self.entropy += float(F.cross_entropy(outputs, labels, ignore_index=IGNORE, reduction="sum"))
        self.pixels += int((labels_ != IGNORE).sum())

    def value(self) -> dict[str, float]:
        """Raises ValueError where no pixel has a label."""
        if not self.pixels:
            raise ValueError("no pixel of the evaluated images has a label; check --ignore-label")
        found = {"miou": 100 * float(self.union.compute()), "pixel_accuracy": 100 * float(self.right.compute())}
        return found | {"loss": self.entropy / self.pixels}
