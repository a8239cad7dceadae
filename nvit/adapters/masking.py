"""Whether a model may be masked: hooks that preparing it would drop or that masks would bypass are found beforehand."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from ..layers import prunable_layers
from ..layers.bypass import bypassed, hook_on
from ..layers.projection import HOOKS


def hook_refusal(model: nn.Module, prepare: Callable[[nn.Module], nn.Module]) -> str | None:
    """The first hook of a model that would count for nothing once it is masked, and what to do; None for none.

    Hooks on the model itself, on its blocks and on whatever else stays are fine.

    Args:
        prepare: the adapter's; it is tried on a copy without memory, if the model is not prepared.
    """
    hooked = {name: hook for name, m in model.named_modules() if name and (hook := hook_on(m)) is not None}
    if not hooked:
        return None
    twin = model if prunable_layers(model) else _skeleton(model)
    before = dict(twin.named_modules())
    stay = set(prepare(twin).modules()) - {module for _, module in bypassed(twin)}
    lost = next((name for name in hooked if before[name] not in stay), None)
    if lost is None:
        return None
    return (
        f"{lost} has {hooked[lost]}, which a masked model would not call; "
        "remove it first and put it on the compact model"
    )


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model without hooks, its parameters on the meta device."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    for module in model.modules():
        memo |= {id(by_id): type(by_id)() for by_id in (getattr(module, name) for name in HOOKS.values())}
    return copy.deepcopy(model, memo)
