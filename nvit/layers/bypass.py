"""What masks would bypass. A masked layer gathers the kept part of plain weights and multiplies by itself: an adapter
around a linear layer, its hooks, a parametrised or quantised weight would silently count for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .base import CAPTURES, prunable_layers
from .projection import hooks
from .stream import Linear

PLAIN_LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear, Linear)
RECOMPUTED = {
    WeightNorm: "torch.nn.utils.remove_weight_norm(module)",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(module)",
    BasePruningMethod: "torch.nn.utils.prune.remove(module, name)",
}
"""Pre-hooks that write a weight before every call, and how they are taken off."""


def carried(model: nn.Module) -> str | None:
    """The first thing in a model that masks cannot cut: where, what, and what to do, in one line; None where all is
    plain."""
    return next((f"{name} {found}" for name, m in model.named_modules() if (found := _carried(m)) is not None), None)


def _carried(module: nn.Module) -> str | None:
    if any(c.__module__.startswith("peft.") for c in type(module).__mro__) and not hasattr(module, "merge_and_unload"):
        kind = "LoRA" if ".lora." in type(module).__module__ else "PEFT"
        return (
            f"carries a {kind} adapter ({_path(module)}), which masks would bypass; merge it first "
            "(model.merge_and_unload())"
        )
    if parametrize.is_parametrized(module):
        tensor, (first, *_) = next(iter(module.parametrizations.items()))
        return (
            f"has a parametrised {tensor} ({_path(first)}), which masks would bypass; make it plain first "
            f"(torch.nn.utils.parametrize.remove_parametrizations(module, {tensor!r}))"
        )
    for _, hook in hooks(module):
        if (undo := next((u for cls, u in RECOMPUTED.items() if isinstance(hook, cls)), None)) is not None:
            return (
                f"computes a weight before every call ({_path(hook)}), which masks would bypass; make it plain first "
                f"({undo})"
            )
    if type(module) not in PLAIN_LINEARS and _is_linear(module):
        return f"is a {_path(module)} and no plain nn.Linear, which masks cannot cut; prune first, and replace it then"
    for name, p in module.named_parameters(recurse=False):
        if is_traceable_wrapper_subclass(p) and not type(p).__module__.startswith("torch.distributed."):
            return (
                f"has a {name} that is a {_path(p)}, which masks cannot cut; prune first, and quantise or compress then"
            )
    return None


def _is_linear(module: nn.Module) -> bool:
    """Subclasses of nn.Linear, and what stands in for one: quantised layers are modules of their own."""
    return isinstance(module, nn.Linear) or all(hasattr(module, a) for a in ("in_features", "out_features", "bias"))


def _path(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def bypassed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every linear layer of a prepared model that a masked layer does not call."""
    for name, layer in prunable_layers(model).items():
        yield from ((f"{name}.{part.name}", part.module) for part in layer.linears() if part.module is not layer)


def hook_on(module: nn.Module) -> str | None:
    """The first hook on a module, those of a capture of ours aside: its kind and the function's name."""
    found = ((kind, f) for kind, f in hooks(module) if f not in CAPTURES)
    return next((f"a {kind} ({_called(f)})" for kind, f in found), None)


def _called(function: Callable) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)
