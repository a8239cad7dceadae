"""One training step as a function that reads nothing back from the device, and its replay as a CUDA graph.

Forward, teacher, loss, backward, scores, clipping, optimiser and projection follow one another without the host knowing
a number. Loss and finiteness stay on the device until somebody looks. After a step that is not finite a flag there
blocks every later update, so that the weights are still those of the last good step when the host finds out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..utils.finite import Finite
from .distill import Objective

AMP = {"no": None, "bf16": torch.bfloat16}
"""Autocast's dtype by the name of a mixed precision that needs no loss scaling."""

Observe = Callable[[Mapping[str, Tensor]], None]


class Step:
    """A training step of one process.

    Args:
        call: gives the student's logits.
        optimizer: fused AdamW, whose `found_inf` blocks an update on the device; see `fused_adamw`.
        clip: largest gradient norm; 0 for none.
        observe: gets gradients by parameter name, before they are clipped and weights move.
        constrain: called after the update, to put back what must stay as it is.

    Attributes:
        loss: of the last step, fp32 scalar on the device.
        finite: knows the first step whose loss or gradient was not finite.
        taken: steps so far, int64 scalar on the device.
    """

    def __init__(
        self,
        call: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        *,
        amp: str = "no",
        clip: float = 0.0,
        start: int = 0,
        observe: Observe | None = None,
        constrain: Callable[[], None] | None = None,
    ) -> None:
        self.call, self.objective, self.optimizer = call, objective, optimizer
        self.dtype, self.clip, self.observe, self.constrain = AMP[amp], clip, observe, constrain
        self.params = dict(call.model.named_parameters())
        self.device = next(iter(self.params.values())).device
        self.loss = torch.zeros((), device=self.device)
        self.finite = Finite(self.device, _said)
        self.taken = torch.full((), start, dtype=torch.int64, device=self.device)
        optimizer.found_inf = torch.zeros((), device=self.device)
        optimizer.grad_scale = None

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """One step on a batch that lies on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False):
            loss = self.objective.of_logits(self.call(images), images, labels)
        loss.backward()
        grads = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        with torch.no_grad():
            norm = torch.stack(torch._foreach_norm(list(grads.values()))).norm()
            self._judge(loss, norm)
        self.finite.check_if_free()
        if self.observe is not None:
            self.observe(grads)
        with torch.no_grad():
            if self.clip:
                scale = (self.clip / (norm + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_(list(grads.values()), scale)
        self.optimizer.step()
        if self.constrain is not None:
            self.constrain()

    def _judge(self, loss: Tensor, norm: Tensor) -> None:
        """Block this update and all later ones where this step is not finite."""
        self.loss.copy_(loss.detach())
        self.finite.add(self.taken, self.loss, norm)
        self.optimizer.found_inf.copy_(self.finite.at >= 0)
        self.taken.add_(1)

    def look(self) -> float:
        """The last step's loss, read back.

        Raises:
            FloatingPointError: a step was not finite; names it. Weights are those of the step before it.
        """
        self.finite.check()
        return float(self.loss)


def _said(step: int, loss: float) -> str:
    what = "a gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
    return f"{what} at step {step}; the last good state is kept. Lower the learning rate or check the data"


class GraphedStep:
    """A `Step` on CUDA that is captured in a graph and replayed, until `reset`.

    The first steps after a reset run as they are, on the capture's stream: they are real steps and warm up whatever is
    chosen at first use. A batch of another shape runs as it is.

    Args:
        replayed: called after every replay, for what Python counts in a step.
    """

    EAGER = 3
    """Steps before a capture."""

    def __init__(self, step: Step, replayed: Callable[[], None] | None = None) -> None:
        self.step, self.replayed = step, replayed
        self.stream = torch.cuda.Stream(step.device)
        self.copying = torch.cuda.Stream(step.device)
        self.reset()

    def reset(self) -> None:
        """Forget the graph: masks, and so shapes, have changed."""
        self.graph: torch.cuda.CUDAGraph | None = None
        self.left = self.EAGER
        self.images = self.labels = None

    def stage(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A batch on its way to the device while the step before still runs."""
        with torch.cuda.stream(self.copying):
            found = tuple(t.to(self.step.device, non_blocking=True) for t in (images, labels))
        return found

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """One step on a batch; see `stage`."""
        current = torch.cuda.current_stream(self.step.device)
        current.wait_stream(self.copying)
        for t in (images, labels):
            t.record_stream(current)
        if self.graph is not None and images.shape == self.images.shape and labels.dtype == self.labels.dtype:
            self._replay(images, labels)
        elif self.left:
            self.left -= 1
            self._eagerly(images, labels)
        elif self.graph is None:
            self._capture(images, labels)
        else:
            self._eagerly(images, labels)

    def _eagerly(self, images: Tensor, labels: Tensor) -> None:
        current = torch.cuda.current_stream(self.step.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.step(images, labels)
        current.wait_stream(self.stream)

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()
        self.step.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.step(self.images, self.labels)
        self.graph = graph
        graph.replay()

    def _replay(self, images: Tensor, labels: Tensor) -> None:
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        if self.replayed is not None:
            self.replayed()
