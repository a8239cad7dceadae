"""From a compact model to a program: what cannot be exported is refused, the rest is read by torch.export."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.export import Dim

from .. import adapters
from ..layers import functional
from ..layers.base import prunable_layers
from ..utils.files import short
from .base import INPUT
from .to_onnx import quiet


class Exportable(nn.Module):
    """A model as a function of images to one tensor, whatever it hands out itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return adapters.predict(self.model, images)


def refusal(model: nn.Module) -> str | None:
    """Why a model cannot be exported, or None."""
    for name, layer in prunable_layers(model).items():
        if layer.masked:
            return (
                f"the model is masked ({name}): its weights are still the dense ones. Export the compact model "
                "(pruner.compact(), result.snapshots[0].model, or a snapshot)"
            )
    for name, p in model.named_parameters():
        if type(p) not in (Tensor, nn.Parameter) or p.layout != torch.strided:
            kind = type(p).__name__ if p.layout == torch.strided else "sparse tensor"
            return f"{name} is a {kind}, which no other runtime reads; load the snapshot with sparse=False"
    return None


def exportable(model: nn.Module, dtype: torch.dtype = torch.float32) -> Exportable:
    """A copy of a dense or compact model on the CPU, in a dtype and in eval mode.

    Raises:
        ValueError: an unsupported family, masks, or compressed weights.
    """
    adapters.find(model)
    if (reason := refusal(model)) is not None:
        raise ValueError(reason)
    return Exportable(copy.deepcopy(model)).to("cpu", dtype).eval().requires_grad_(False)


def read(model: Exportable, images: Tensor, static: bool = False) -> torch.export.ExportedProgram:
    """The program of a model.

    Args:
        images: two or more, of the size that it is for.
        static: it is for batches of exactly so many; otherwise for any number, one included.

    Raises:
        ValueError: torch.export cannot follow the model.
    """
    shapes = None if static else {INPUT: {0: Dim("batch")}}
    try:
        with torch.no_grad(), functional.kernels(False), quiet():
            return torch.export.export(model, (images,), dynamic_shapes=shapes)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, torch._dynamo.exc.TorchDynamoException) as e:
        raise ValueError(f"torch.export cannot follow {type(model.model).__name__}: {short(e, 200)}") from None
