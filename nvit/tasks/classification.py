"""One class an image: softmax and cross entropy, the task of the paper (arXiv:2110.04869)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.base import Logits
from .base import Meter, Task, rows_of, signs


class Classification(Task):
    """One class an image.

    Labels are class numbers, int64 `(batch,)`, or probabilities `(batch, classes)` after mixup.
    """

    name, metric, class_numbers = "classification", "top1", True

    def labels(self, images: Tensor, labels: Tensor | None) -> Tensor:
        labels = self.given(labels)
        if labels.is_floating_point():
            fits = labels.dim() == 2 and self.outputs in (None, labels.shape[1])
            if not fits or (labels.device.type == "cpu" and not bool(((labels.sum(1) - 1).abs() < 1e-3).all())):
                raise ValueError(
                    f"labels are {_shape(labels)}, neither class numbers nor probabilities of {self.outputs} classes "
                    "that sum to 1; for several classes an image take --task multilabel, for numbers --task regression"
                )
            return labels
        if labels.dim() != 1:
            raise ValueError(
                f"labels are {_shape(labels)}; expected a class number an image, (batch,). For several classes an "
                "image take --task multilabel"
            )
        if labels.device.type == "cpu" and len(labels):
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or (self.outputs is not None and high >= self.outputs):
                raise ValueError(
                    f"a label is {low if low < 0 else high}, but the model has {self.outputs} classes, counted from 0; "
                    "check the class numbers, or give the model a head that fits"
                )
        return labels.long()

    def loss(
        self,
        student: Logits,
        labels: Tensor,
        hard: Tensor | None = None,
        *,
        hard_weight: float = 0.5,
        smoothing: float = 0.0,
    ) -> Tensor:
        """Cross entropy with the labels and, from the distillation token, with a CNN teacher's hard labels (Eq. 8).

        The equation sums both terms; the published runs weigh them ½ and ½. A model without a distillation token puts
        both on its one output; without a CNN teacher it is plain cross entropy (of the mean output of both tokens, as
        the model itself would answer).

        Args:
            hard: the CNN teacher's class numbers, int64 `(batch,)`.
            hard_weight: share of the second term.
            smoothing: of `labels`.
        """
        if hard is None:
            return F.cross_entropy(student.mean, labels, label_smoothing=smoothing)
        own = F.cross_entropy(student.cls, labels, label_smoothing=smoothing)
        second = student.cls if student.dist is None else student.dist
        return (1 - hard_weight) * own + hard_weight * F.cross_entropy(second, hard)

    def distance(self, student: Logits, teacher: Logits, tau: float) -> Tensor:
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

    def draw(self, outputs: Tensor, rows: Sequence[int] = (), batch: int = 0) -> Tensor:
        """From the softmax, int64 `(batch,)`."""
        p = outputs.detach().float().softmax(-1)
        # What multinomial does inside once it has looked at p, which a GPU would have to wait for.
        draws = p.new_empty(batch if rows else len(p), p.shape[1]).exponential_()
        return (p / rows_of(draws, rows)).argmax(-1)

    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """The Hessian is diag(p) - p pᵀ, p the softmax."""
        p = outputs.detach().float().softmax(-1)
        half = p.sqrt() * signs(p, generator)
        return (half - p * half.sum(-1, keepdim=True)).to(outputs)

    def meter(self) -> Meter:
        return TopK()


class TopK(Meter):
    """Top-1 with its standard error and top-5 in percent, and mean cross entropy."""

    def __init__(self) -> None:
        self.top1 = self.top5 = self.images = 0
        self.entropy = 0.0

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        ranked = outputs.topk(min(5, outputs.shape[1]), -1).indices == labels[:, None]
        self.top1 += int(ranked[:, :1].sum())
        self.top5 += int(ranked.sum())
        self.entropy += float(F.cross_entropy(outputs, labels, reduction="sum"))
        self.images += len(labels)

    def so_far(self) -> str:
        return f"top-1 {100 * self.top1 / self.images:.2f} % of "

    def value(self) -> dict[str, float]:
        n = self.images
        top1 = 100 * self.top1 / n
        return {"top1": top1, "top1_se": standard_error(top1, n), "top5": 100 * self.top5 / n, "loss": self.entropy / n}


def standard_error(percent: float, images: int) -> float:
    """Standard error, in points, of `percent` of so many images. Two right and two wrong ones are added, so that none
    right of a few images is not certainty (Agresti & Coull 1998)."""
    share = (percent / 100 * images + 2) / (images + 4)
    return 100 * math.sqrt(share * (1 - share) / (images + 4))


def _shape(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"
