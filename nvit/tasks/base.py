"""What a task is: the contract between what a model is for and the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapters.base import Logits
from ..utils.devices import sent


class Meter(ABC):
    """Sums up how well outputs answer labels, batch by batch."""

    @abstractmethod
    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """A batch: outputs `(batch, outputs)` fp32, and labels as `Task.labels` gives them."""

    def so_far(self) -> str:
        """A word for a progress line, where it costs nothing."""
        return ""

    @abstractmethod
    def value(self) -> dict[str, float]:
        """Metrics over everything added, the task's own `metric` among them."""


class Task(ABC):
    """What a model is for.

    Scores, refits, distillation and evaluation ask it. A loss is a mean over the batch.

    Attributes:
        name: as `--task` takes it.
        metric: the key of the number that stands for it, of those that its meter gives.
        reads_labels: its batches hold labels; otherwise the unpruned model's outputs take their place.
        class_numbers: labels are class numbers, so that class folders, smoothing, mixup, and a second teacher's hard
            labels go with it.
        every_token: its answers are about every place of an image, so that none of its tokens may merge.
        own: settings of a recipe that are for this task alone.
        outputs: of the model; 0 of one without a head, None where it does not say.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    reads_labels: ClassVar[bool] = True
    class_numbers: ClassVar[bool] = False
    every_token: ClassVar[bool] = False
    own: ClassVar[tuple[str, ...]] = ()

    def __init__(self, outputs: int | None) -> None:
        self.outputs = outputs

    @abstractmethod
    def labels(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """The labels of a batch as `loss` takes them, checked where they lie on the CPU.

        Raises:
            ValueError: they are missing, or are not what this task is about.
        """

    @abstractmethod
    def loss(self, student: Logits, labels: Tensor) -> Tensor:
        """Of outputs that are to answer labels, a scalar."""

    @abstractmethod
    def distance(self, student: Logits, teacher: Logits, tau: float) -> Tensor:
        """L_full: how far the outputs of a pruned model are from those of the unpruned one, a scalar.

        Args:
            tau: temperature, where outputs are softened by one.
        """

    @abstractmethod
    def draw(self, outputs: Tensor, rows: Sequence[int] = (), batch: int = 0) -> Tensor:
        """Labels drawn from what the model itself says, for scores without labels.

        Args:
            rows, batch: where `outputs` are these rows of a larger batch, they get the labels they would get in it.
        """

    @abstractmethod
    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A draw shaped as `outputs` `(batch, outputs)` whose second moment is the Hessian of an image's loss there.

        It does not depend on the labels. Sent backward, it gives gradients whose second moments are Gauss-Newton's.
        """

    @abstractmethod
    def meter(self) -> Meter:
        """An empty one."""

    def check(self, config: Any) -> None:
        """Raise ValueError where a recipe (`config.TrainingConfig` or a kind of it) asks for what this task has not."""
        for field, default in (("features", "auto"), ("keep_output", False)):
            if field not in self.own and getattr(config, field, default) != default:
                raise ValueError(f"{field} is for task features, the task is {self.name}; leave it out")
        if self.every_token and getattr(config, "merges_tokens", False):
            raise ValueError(
                f"only tokens: task {self.name} answers for every place of an image, so each of its tokens is needed; "
                "leave out tokens (--only widths)"
            )
        if self.class_numbers:
            return
        for field in ("cnn_teacher", "label_smoothing", "mixup", "cutmix"):
            if getattr(config, field):
                raise ValueError(f"{field} goes with class numbers, which task {self.name} has not; leave it out")

    def given(self, labels: Tensor | None) -> Tensor:
        """Labels of a batch that must have some."""
        if labels is None:
            raise ValueError(
                f"task {self.name} reads labels, but the loader gives images alone; give a loader of (images, labels)"
            )
        return torch.as_tensor(labels)


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs shaped as `like` and where it is, fp32; the same on every device."""
    drawn = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return sent(drawn, like.device).float() * 2 - 1


def rows_of(draws: Tensor, rows: Sequence[int]) -> Tensor:
    """Draws of a whole batch, or those of some of its rows."""
    return draws[list(rows)] if rows else draws
