"""Every entrypoint of the supported families' timm modules, and whether it can be pruned.

Models are built without weights and few blocks deep: what an adapter looks at does not depend on depth.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial

import timm
import torch
from torch import nn

from docs.tables.base import table
from nvit import adapters

MODULES: dict[str, dict] = {
    "deit": {"depth": 2},
    "vision_transformer": {"depth": 2},
    "swin_transformer": {"depths": (2, 1, 1, 1)},
    "eva": {"depth": 2},
    "beit": {"depth": 2},
}
"""The modules under `timm.models` that the adapters were written for, and what makes their models shallow."""


def entrypoints() -> dict[str, str]:
    """Names of all models of `MODULES`, without their pretrained tags, and the module of each."""
    return {name: module for module in MODULES for name in sorted(set(timm.list_models(module=module)))}


def skeleton(name: str, **more) -> nn.Module:
    """A shallow timm model without weights; of its own depth where its arguments name every block."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return timm.create_model(name, **MODULES[entrypoints()[name]] | more)
        except AssertionError:
            return timm.create_model(name, **more)


@cache
def refusals() -> dict[str, str | None]:
    """Why each entrypoint is refused, None for a supported one."""
    return {name: adapters.refusal(skeleton(name)) for name in entrypoints()}


def summary(found: Mapping[str, str | None]) -> str:
    """A line per module: how many of its entrypoints can be pruned."""
    lines = []
    for module in MODULES:
        mine = [found[name] for name, of in entrypoints().items() if of == module]
        lines.append([f"`timm.models.{module}`", str(sum(r is None for r in mine)), str(len(mine))])
    lines.append(["all", str(sum(r is None for r in found.values())), str(len(found))])
    return table([f"in timm {timm.__version__}", "can be pruned", "of"], lines)


def of_module(module: str, found: Mapping[str, str | None]) -> str:
    """A line per entrypoint of a module."""
    mine = [name for name, of in entrypoints().items() if of == module]
    lines = [[f"`{name}`", "no" if found[name] else "yes", found[name] or ""] for name in mine]
    return table(["entrypoint", "supported", "reason"], lines)


def tables(found: Callable[[], Mapping[str, str | None]]) -> dict[str, Callable[[], str]]:
    """The page's tables for these refusals."""
    made: dict[str, Callable[[], str]] = {"summary": lambda: summary(found())}
    for module in MODULES:
        made[module] = partial(lambda module: of_module(module, found()), module)
    return made


TABLES = tables(refusals)
