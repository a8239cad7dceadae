"""The gate of every unit: its gradient recorded from activations, and saliencies that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..calibration.capture import Place, capture
from ..layers import prunable_layers
from ..layers.base import index
from ..spec import Group
from ..utils.devices import sent
from .base import BatchMean, Capabilities, Context, Evidence
from .gradients import gate_gradients, wide

_AT_ONCE = 2**21
"""Products of activation and gradient that are summed at once."""


class GateRecorder:
    """Reads gate gradients of every group from activations, per sample, while it is open.

    ```python
    with GateRecorder(model, groups, masks) as gates:
        loss.backward()                       # weights may be frozen
    gates.pop()["blocks.0.mlp"]               # (batch, group.size): each sample's share of the batch's gate gradient
    ```
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], masks: Mapping[str, Tensor]) -> None:
        self.model, self.groups = model, {g.name: g for g in groups}
        self.sums: dict[str, Tensor] = {}
        self.units: dict[Place, list[tuple[str, int]]] = {}
        for name, layer in prunable_layers(model).items():
            for site, declared in layer.sites().items():
                leaving = [(layer.axes[kind], dim) for kind, dim in declared.axes.items() if kind in layer.axes]
                if mine := [(group, dim) for group, dim in leaving if group in self.groups]:
                    self.units[name, site] = mine
        device = next(model.parameters()).device
        self.kept = {n: None if (i := index(masks[n])) is None else sent(i, device) for n in self.groups}
        self.captured = None

    def __enter__(self) -> GateRecorder:
        self.captured = capture(self.model, self.units, self._add_place)
        self.captured.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self.captured is not None:
            captured, self.captured = self.captured, None
            captured.__exit__(*(error or (None, None, None)))

    def _add_place(self, place: Place, act: Tensor, grad: Tensor) -> None:
        for group, dim in self.units[place]:
            self._add(group, dim, act, grad)

    def _add(self, name: str, axis: int, act: Tensor, grad: Tensor) -> None:
        """Sum `act * grad` over everything but the image and the unit."""
        others = [d for d in range(1, act.dim()) if d != act.dim() + axis]
        # A few images at a time: the products, wider than a bfloat16 activation, are never there as a whole.
        few = max(1, _AT_ONCE // act[0].numel())
        products = (wide(a) * wide(g) for a, g in zip(act.split(few), grad.split(few), strict=True))
        part = torch.cat([p.sum(others) if others else p for p in products])
        self.sums[name] = self.sums[name] + part if name in self.sums else part

    def pop(self) -> dict[str, Tensor]:
        """Gate gradients since the last call, `(batch, group.size)`, zero at pruned units.

        Raises:
            KeyError: no backward pass reached a group's layer.
        """
        out = {}
        for name, g in self.groups.items():
            narrow, kept = self.sums[name], self.kept[name]
            wide = narrow if kept is None else narrow.new_zeros(len(narrow), g.size).index_copy_(1, kept, narrow)
            out[name] = wide
        self.sums.clear()
        return out


class RecordedGates(BatchMean):
    """A criterion that reads the per-sample gate gradients of a batch, recorded from activations."""

    capabilities = Capabilities()

    def __init__(self, momentum: float | None = None) -> None:
        super().__init__(momentum)
        self.recorder: GateRecorder | None = None
        self.parts: list[dict[str, Tensor]] = []

    def records(self, context: Context) -> bool:
        """Whether gates are recorded; otherwise gradients of weights say all."""
        return True

    def begin(self, context: Context) -> None:
        super().begin(context)
        if self.records(context):
            self.recorder = GateRecorder(context.model, context.groups, context.masks).__enter__()

    def backward(self, logits: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        super().backward(logits, loss)
        self.parts.append(self.recorder.pop())

    def observe(self, batch: Evidence) -> None:
        """Add what a batch says.

        Raises:
            ValueError: a score is not finite, or gates are not being recorded.
        """
        if batch.gates is None and self.recorder is not None:
            parts, self.parts = self.parts or [self.recorder.pop()], []
            batch = replace(batch, gates={name: torch.cat([p[name] for p in parts]) for name in parts[0]})
        elif batch.gates is None and self.records(self.context):
            raise ValueError(
                f"criterion {self.name} reads gates, which nobody recorded; call start_recording() before the forward "
                "pass, or score(images, labels)"
            )
        super().observe(batch)

    def close(self) -> None:
        super().close()
        self.parts = []
        if self.recorder is not None:
            self.recorder.__exit__()
            self.recorder = None


class Hessian(RecordedGates):
    """Squared gate gradient, the gate placed where the unit leaves the network (arXiv:2110.04869, Eq. 6). loss²"""

    name = "hessian"

    def records(self, context: Context) -> bool:
        return context.scoring  # a training step has gradients of weights anyway

    @staticmethod
    def score(groups: Sequence[Group], batch: Evidence) -> dict[str, Tensor]:
        return {name: total.square() for name, total in batch.gate_gradients(groups).items()}


class Nvit(BatchMean):
    """Squared gate gradient over the tensors of the published runs, divided by theirs per kind. loss²"""

    name, capabilities = "nvit", Capabilities(weight_gradients=True)

    @staticmethod
    def score(groups: Sequence[Group], batch: Evidence) -> dict[str, Tensor]:
        totals = gate_gradients(groups, batch.params, batch.grads, lambda g: g.published_slices)
        return {g.name: (totals[g.name] / g.divisor).square() for g in groups}


class Absolute(RecordedGates):
    """Mean over samples of the absolute gate gradient of the sample's own loss. loss"""

    name = "abs"

    @staticmethod
    def score(groups: Sequence[Group], batch: Evidence) -> dict[str, Tensor]:
        return batch.over_ranks({g.name: batch.gates[g.name].abs().sum(0) for g in groups})
