"""Write docs/models.md: every entrypoint of the supported families' timm modules, and whether it can be pruned.

    python docs/make_models_page.py

Models are built without weights and few blocks deep: what an adapter looks at does not depend on depth.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import timm
import torch
from torch import nn

from nvit import adapters

MODULES: dict[str, dict] = {
    "deit": {"depth": 2},
    "vision_transformer": {"depth": 2},
    "swin_transformer": {"depths": (2, 1, 1, 1)},
    "eva": {"depth": 2},
    "beit": {"depth": 2},
}
"""The modules under `timm.models` that the adapters were written for, and what makes their models shallow."""

PAGE = Path(__file__).with_name("models.md")

HEADER = """# Supported models

Every entrypoint of {modules} in timm {timm}. {supported} of {total}
can be pruned. The others are refused with the reason in the last column; so is any model of another family.
Written by `docs/make_models_page.py`.
"""
TABLE = """
## timm.models.{module}: {supported} of {total}

| entrypoint | supported | reason |
|---|---|---|
"""


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


def page(refusals: dict[str, str | None]) -> str:
    """The page for these refusals by entrypoint, None for a supported one."""
    modules = entrypoints()
    counts = {"supported": sum(reason is None for reason in refusals.values()), "total": len(refusals)}
    text = HEADER.format(modules=", ".join(f"`timm.models.{m}`" for m in MODULES), timm=timm.__version__, **counts)
    for module in MODULES:
        mine = {name: reason for name, reason in refusals.items() if modules[name] == module}
        text += TABLE.format(module=module, supported=sum(r is None for r in mine.values()), total=len(mine))
        text += "".join(f"| `{n}` | {'no' if reason else 'yes'} | {reason or ''} |\n" for n, reason in mine.items())
    return text


if __name__ == "__main__":
    PAGE.write_text(page({name: adapters.refusal(skeleton(name)) for name in entrypoints()}))
