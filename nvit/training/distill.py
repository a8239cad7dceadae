"""Teachers and losses: L = alpha L_full + L_CNN (arXiv:2110.04869, Eq. 8 and 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import adapters
from ..adapters.base import Logits
from ..config import TrainingConfig


def full_loss(student: Logits, teacher: Logits, tau: float) -> Tensor:
    """KL(teacher ‖ student) of outputs softened by `tau`, mean over the batch, summed over both tokens (Eq. 9).

    There is no factor of tau². Where the two differ in tokens, the class token's output stands in.
    """
    total = torch.zeros((), device=student.cls.device)
    for s, t in zip(student, teacher, strict=True):
        if s is not None:
            t = teacher.cls if t is None else t
            p, q = F.log_softmax(t / tau, -1), F.log_softmax(s / tau, -1)
            total = total + F.kl_div(q, p, reduction="batchmean", log_target=True)
    return total


def cnn_loss(
    student: Logits, labels: Tensor, cnn_labels: Tensor | None, cnn_weight: float = 0.5, smoothing: float = 0.0
) -> Tensor:
    """Cross entropy with the labels and, from the distillation token, with the CNN teacher's hard labels (Eq. 8).

    The equation sums both terms; the published runs weigh them ½ and ½. A model without a distillation token puts
    both on its one output; without a CNN teacher it is plain cross entropy (of the mean output of both tokens, as the
    model itself would answer).

    Args:
        labels: int64 `(batch,)`, or probabilities `(batch, classes)` after mixup.
        cnn_labels: int64 `(batch,)`.
        cnn_weight: share of the second term.
    """
    if cnn_labels is None:
        return F.cross_entropy(student.mean, labels, label_smoothing=smoothing)
    own = F.cross_entropy(student.cls, labels, label_smoothing=smoothing)
    second = student.cls if student.dist is None else student.dist
    return (1 - cnn_weight) * own + cnn_weight * F.cross_entropy(second, cnn_labels)


def sample_labels(logits: Tensor, rows: Sequence[int] = (), batch: int = 0) -> Tensor:
    """Labels drawn from the model's own softmax, int64 `(batch,)`: for scoring without labels.

    Args:
        rows, batch: where `logits` are these rows of a larger batch, they get the labels they would get in it.
    """
    p = logits.detach().float().softmax(-1)
    # What multinomial does inside once it has looked at p, which a GPU would have to wait for.
    draws = p.new_empty(batch if rows else len(p), p.shape[1]).exponential_()
    return (p / (draws[list(rows)] if rows else draws)).argmax(-1)


@dataclass(frozen=True)
class Objective:
    """The training loss of one batch.

    Attributes:
        teacher: the unpruned model, prepared and frozen; None drops L_full.
        cnn_teacher: any timm model, frozen; None makes L_CNN plain cross entropy.
        renormalise: `(scale, shift)` per channel from the student's image normalisation to the CNN teacher's.
    """

    teacher: nn.Module | None = None
    cnn_teacher: nn.Module | None = None
    weight: float = 100.0
    tau: float = 3.0
    cnn_weight: float = 0.5
    smoothing: float = 0.0
    renormalise: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, config: TrainingConfig, teacher=None, cnn_teacher=None, renormalise=None) -> Objective:
        """The objective of a recipe with these teachers."""
        weights = {"weight": config.distill_weight, "tau": config.distill_tau, "cnn_weight": config.cnn_weight}
        return cls(teacher, cnn_teacher, smoothing=config.label_smoothing, renormalise=renormalise, **weights)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return self.of_logits(adapters.find(model).logits(model, images), images, labels)

    def of_logits(self, student: Logits, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a student that has given these logits."""
        cnn_labels = None
        if self.cnn_teacher is not None:
            with torch.no_grad():
                theirs = images if self.renormalise is None else images * self.renormalise[0] + self.renormalise[1]
                cnn_labels = self.cnn_teacher(theirs).argmax(-1)
        loss = cnn_loss(student, labels, cnn_labels, self.cnn_weight, self.smoothing)
        if self.teacher is not None and self.weight:
            with torch.no_grad():
                targets = adapters.find(self.teacher).logits(self.teacher, images)
            loss = loss + self.weight * full_loss(student, targets, self.tau)
        return loss


def frozen(model: nn.Module | None) -> nn.Module | None:
    """The model as a teacher: eval mode, no gradients."""
    return model if model is None else model.eval().requires_grad_(False)


def renormalisation(student: Mapping[str, Any], teacher: Mapping[str, Any], device) -> tuple[Tensor, Tensor] | None:
    """Per-channel scale and shift between two models' image normalisations; None where they are the same."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=device).view(1, -1, 1, 1)

    if tuple(student["mean"]) == tuple(teacher["mean"]) and tuple(student["std"]) == tuple(teacher["std"]):
        return None
    mean, std, mean2, std2 = (column(d[k]) for d in (student, teacher) for k in ("mean", "std"))
    return std / std2, (mean - mean2) / std2
