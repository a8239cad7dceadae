"""A batch forward through a model and backward what a criterion reads, in the parts of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from .. import parallel
from ..adapters.base import Logits
from ..criteria.base import Criterion
from ..tasks import Task
from ..training.data import seed_draws
from ..utils.devices import sent
from ..utils.finite import Finite
from .plan import Plan


@contextmanager
def wanting_gradients(params: Mapping[str, nn.Parameter], wanted: bool) -> Iterator[None]:
    """Inside, all parameters want gradients or none does."""
    before = {name: p.requires_grad for name, p in params.items()}
    try:
        for p in params.values():
            p.requires_grad_(wanted)
        yield
    finally:
        for name, p in params.items():
            p.requires_grad_(before[name])


@dataclass(frozen=True)
class LabelLoss:
    """The task's loss of a part of a batch, with its labels or with labels drawn from what the model itself says.

    Attributes:
        task: whose loss.
        labels: of this part; None where they are drawn.
        places: of this part's images in the batch.
        batch: images in the batch, of all parts and ranks.
        number: of the batch, for messages and with `seed` for draws.
        finite: sees every loss.
    """

    task: Task
    labels: Tensor | None
    places: list[int]
    batch: int
    number: int
    seed: int
    finite: Finite

    def __call__(self, logits: Tensor) -> Tensor:
        """The loss of this part's logits, as much of the batch's mean as it has of its images.

        Parts add up to the mean over this rank's images, and the mean over ranks is then the batch's.

        Raises:
            FloatingPointError: it is not finite, on whichever rank. Where looking waits, `finite` knows.
        """
        seed_draws(self.seed, 2**31 + self.number)
        if self.labels is None:
            target = self.task.draw(logits, self.places if len(logits) < self.batch else (), self.batch)
        else:
            target = sent(self.labels, logits.device)
        ranks = parallel.world()
        loss = self.task.loss(Logits(logits), target) * (len(logits) * ranks / self.batch)
        self.finite.add(self.number, parallel.mean({"loss": loss.detach()})["loss"])
        self.finite.check_if_free()
        return loss


def backward(
    call: nn.Module,
    criterion: Criterion,
    task: Task,
    images: Tensor,
    labels: Tensor | None,
    plan: Plan,
    seed: int,
    finite: Finite,
) -> None:
    """One batch forward through `call`, and backward what the criterion reads, in the parts of `plan`.

    Args:
        images, labels: this rank's share of the batch; without ranks, all of it. Labels are drawn where None.
        finite: sees every loss.
    """
    device = next(call.model.parameters()).device
    (batch,) = map(int, parallel.sums([len(images)], device))
    places, number = parallel.share(batch), criterion.batches + 1
    for part in plan.parts(len(images)):
        with plan.running(call.model):
            logits = call(sent(images[part], device)).mean
        loss = LabelLoss(task, None if labels is None else labels[part], places[part], batch, number, seed, finite)
        criterion.backward(logits.float() if plan.bf16 else logits, loss)
