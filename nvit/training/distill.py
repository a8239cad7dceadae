"""Teachers and losses: L = alpha L_full + L_CNN (arXiv:2110.04869, Eq. 8 and 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import adapters
from ..adapters.base import Logits
from ..config import TrainingConfig
from ..tasks import Task


@dataclass(frozen=True)
class Objective:
    """The training loss of one batch.

    Attributes:
        task: whose losses they are.
        teacher: the unpruned model, prepared and frozen; None drops L_full.
        cnn_teacher: any timm model, frozen, for a task of class numbers; None leaves the task's own loss alone.
        renormalise: `(scale, shift)` per channel from the student's image normalisation to the CNN teacher's.
    """

    task: Task
    teacher: nn.Module | None = None
    cnn_teacher: nn.Module | None = None
    weight: float = 100.0
    tau: float = 3.0
    cnn_weight: float = 0.5
    smoothing: float = 0.0
    renormalise: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, config: TrainingConfig, task: Task, teacher=None, cnn_teacher=None, renormalise=None) -> Objective:
        """The objective of a recipe with these teachers.

        Raises:
            ValueError: the recipe asks for what the task has not.
        """
        task.check(config)
        if not task.reads_labels and teacher is None:
            raise ValueError(
                f"task {task.name} trains towards the unpruned model, and there is no teacher; give it one"
            )
        weights = {"weight": config.distill_weight, "tau": config.distill_tau, "cnn_weight": config.cnn_weight}
        return cls(task, teacher, cnn_teacher, smoothing=config.label_smoothing, renormalise=renormalise, **weights)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return self.of_logits(adapters.find(model).logits(model, images), images, labels)

    def of_logits(self, student: Logits, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a student that has given these logits."""
        loss = self._own(student, images, labels)
        if self.teacher is not None and self.weight:
            with torch.no_grad():
                targets = adapters.find(self.teacher).logits(self.teacher, images)
            loss = loss + self.weight * self.task.distance(student, targets, self.tau)
        return loss

    def _own(self, student: Logits, images: Tensor, labels: Tensor) -> Tensor:
        """L_CNN of class numbers, else the task's loss."""
        if not self.task.class_numbers:
            return self.task.loss(student, labels)
        hard = None
        if self.cnn_teacher is not None:
            with torch.no_grad():
                theirs = images if self.renormalise is None else images * self.renormalise[0] + self.renormalise[1]
                hard = self.cnn_teacher(theirs).argmax(-1)
        return self.task.loss(student, labels, hard, hard_weight=self.cnn_weight, smoothing=self.smoothing)


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
