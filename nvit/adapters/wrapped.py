"""Models that no adapter takes as they come, and the way in: wrappers, models inside others, subclasses."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

TOOK_OVER = {
    "DataParallel": "prune the model first and wrap the result",
    "DistributedDataParallel": "under torchrun nvit synchronises the ranks itself",
    "OptimizedModule": "compile the pruned model instead",
}
"""Wrappers of torch, and when to use them."""


def way_in(model: nn.Module, knows: Callable[[nn.Module], bool], hosts: tuple[type, ...]) -> str | None:
    """How to get from `model`, whose class no adapter knows, to one that nvit takes; None where there is no way.

    Args:
        knows: whether some adapter knows the class of a model.
        hosts: the classes that adapters know.
    """
    inside = next(((name, m) for name, m in model.named_modules() if name and knows(m)), None)
    if inside is not None:
        name, found = inside
        if hasattr(model, "merge_and_unload"):  # adapters of PEFT: what they learned would stay behind
            return f"it holds a {type(found).__name__} with adapters; give nvit model.merge_and_unload() instead"
        said = TOOK_OVER.get(type(model).__name__, "put the pruned one back in its place")
        return f"it holds a {type(found).__name__}; give nvit model.{name} instead ({said})"
    base = next((cls for cls in type(model).__mro__ if cls in hosts), None)
    if base is not None:
        return (
            f"it is a subclass of {base.__name__}, which may compute something else; give nvit a plain "
            f"{base.__name__} with its weights, or write an adapter (nvit/adapters)"
        )
    if type(model).__module__.startswith("torchvision."):
        return "it is torchvision's; take the timm model of that name and weights (timm.list_models('vit*'))"
    return None


def tied(model: nn.Module) -> str | None:
    """Which parameter stands in two places, or None."""
    seen: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(p), name)
        if first != name:
            return f"{name} is the same parameter as {first} (tied); give each its own copy, as copy.deepcopy does"
    return None
