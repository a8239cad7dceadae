"""Any number of classes an image: a sigmoid and a binary cross entropy for each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.base import Logits
from .base import Meter, Task, rows_of, signs


class MultiLabel(Task):
    """Any number of classes an image.

    Labels are 0 or 1, or probabilities in between, `(batch, classes)`. Losses are means over the classes, as torch's
    `BCEWithLogitsLoss` and transformers' models have them.
    """

    name, metric = "multilabel", "mAP"

    def labels(self, images: Tensor, labels: Tensor | None) -> Tensor:
        labels = self.given(labels)
        if labels.dim() == 1 and self.outputs == 1:
            labels = labels[:, None]
        if labels.shape != (len(images), self.outputs):
            raise ValueError(
                f"labels are {tuple(labels.shape)}; task multilabel expects a 0 or 1 for each of the model's "
                f"{self.outputs} classes, ({len(images)}, {self.outputs}). For one class an image take --task "
                "classification"
            )
        labels = labels.float()
        if labels.device.type == "cpu" and labels.numel():
            low, high = float(labels.min()), float(labels.max())
            if not (low >= 0 and high <= 1):
                raise ValueError(f"a label is {low if not low >= 0 else high:g}; task multilabel expects 0 to 1")
        return labels

    def loss(self, student: Logits, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(student.mean, labels.to(student.mean.dtype))

    def distance(self, student: Logits, teacher: Logits, tau: float) -> Tensor:
        """KL(teacher ‖ student) of every class's yes and no, softened by `tau`, mean over batch and classes."""
        s, t = student.mean / tau, teacher.mean / tau
        p = t.sigmoid()
        return (p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))).mean()

    def draw(self, outputs: Tensor, rows: Sequence[int] = (), batch: int = 0) -> Tensor:
        """A yes or no of each class by its sigmoid, fp32 `(batch, classes)`."""
        p = outputs.detach().float().sigmoid()
        return (rows_of(p.new_empty(batch if rows else len(p), p.shape[1]).uniform_(), rows) < p).float()

    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """The Hessian is diag(p (1 - p)) over the number of classes, p the sigmoids."""
        p = outputs.detach().float().sigmoid()
        return (signs(p, generator) * (p * (1 - p) / p.shape[1]).sqrt()).to(outputs)

    def meter(self) -> Meter:
        return AveragePrecision()


class AveragePrecision(Meter):
    """Mean average precision over the classes that occur, the share of classes told rightly at a threshold of ½, both
    in percent, and mean binary cross entropy."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        self.outputs.append(outputs.cpu())
        self.labels.append(labels.cpu())

    def value(self) -> dict[str, float]:
        from torchmetrics.functional.classification import multilabel_average_precision

        outputs, labels = torch.cat(self.outputs), torch.cat(self.labels)
        yes = (labels > 0.5).long()
        occurring = yes.any(0)
        found = math.nan
        if bool(occurring.any()):
            # The sigmoid keeps the order, but for logits so large that it rounds them to the same number.
            ranked = outputs[:, occurring].double().sigmoid()
            if int(occurring.sum()) == 1:
                from torchmetrics.functional.classification import binary_average_precision

                found = float(binary_average_precision(ranked[:, 0], yes[:, occurring][:, 0]))
            else:
                found = float(multilabel_average_precision(ranked, yes[:, occurring], int(occurring.sum())))
        right = ((outputs > 0) == yes.bool()).float().mean()
        entropy = F.binary_cross_entropy_with_logits(outputs, labels)
        return {"mAP": 100 * found, "accuracy": 100 * float(right), "loss": float(entropy)}
