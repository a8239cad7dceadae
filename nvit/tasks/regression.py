"""Numbers of an image: squared errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.base import Logits
from .base import Meter, Task, rows_of, signs


class Regression(Task):
    """Numbers of an image, `(batch, outputs)`; of a model with one output also `(batch,)`.

    Losses are mean squares over outputs, as transformers' models have them. There is no temperature.
    """

    name, metric = "regression", "mae"

    def labels(self, images: Tensor, labels: Tensor | None) -> Tensor:
        labels = self.given(labels)
        if labels.dim() == 1 and self.outputs == 1:
            labels = labels[:, None]  # or it would be broadcast against (batch, 1)
        if labels.shape != (len(images), self.outputs):
            raise ValueError(
                f"labels are {tuple(labels.shape)}; task regression expects a number for each of the model's outputs, "
                f"({len(images)}, {self.outputs})"
            )
        labels = labels.float()
        if labels.device.type == "cpu" and not bool(labels.isfinite().all()):
            raise ValueError("a label is not finite; task regression expects numbers")
        return labels

    def loss(self, student: Logits, labels: Tensor) -> Tensor:
        return F.mse_loss(student.mean, labels.to(student.mean.dtype))

    def distance(self, student: Logits, teacher: Logits, tau: float) -> Tensor:
        return F.mse_loss(student.mean, teacher.mean)

    def draw(self, outputs: Tensor, rows: Sequence[int] = (), batch: int = 0) -> Tensor:
        """The outputs with standard normal noise, fp32 `(batch, outputs)`: a squared error knows no other width."""
        own = outputs.detach().float()
        return own + rows_of(own.new_empty(batch if rows else len(own), own.shape[1]).normal_(), rows)

    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """The Hessian is 2 over the number of outputs on the diagonal."""
        return (signs(outputs, generator) * math.sqrt(2 / outputs.shape[1])).to(outputs)

    def meter(self) -> Meter:
        return Errors()


class Errors(Meter):
    """Mean absolute error, root of the mean squared error, and R² of all outputs together."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        self.outputs.append(outputs.double().cpu())
        self.labels.append(labels.double().cpu())

    def value(self) -> dict[str, float]:
        outputs, labels = torch.cat(self.outputs), torch.cat(self.labels)
        error, spread = (outputs - labels).square(), (labels - labels.mean(0)).square()
        found = {"mae": float((outputs - labels).abs().mean()), "rmse": math.sqrt(float(error.mean()))}
        found["r2"] = 1 - float(error.sum() / spread.sum()) if float(spread.sum()) else math.nan
        return found | {"loss": float(error.mean())}
