"""Write docs/models.md: every entrypoint of the supported families' timm modules, and whether it can be pruned.

    python docs/make_models_page.py

Models are built without weights and two blocks deep: what an adapter looks at does not depend on depth.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from torch import nn

from nvit import adapters

MODULES = ("deit", "vision_transformer")
"""The modules under `timm.models` that the adapters were written for."""

PAGE = Path(__file__).with_name("models.md")

HEADER = """# Supported models

Every entrypoint of `timm.models.{modules}` in timm {timm}. {supported} of {total}
can be pruned. The others are refused with the reason in the last column; so is any model of another family.
Written by `docs/make_models_page.py`.

| entrypoint | supported | reason |
|---|---|---|
"""


def entrypoints() -> list[str]:
    """Names of all models of `MODULES`, without their pretrained tags."""
    return sorted({name for module in MODULES for name in timm.list_models(module=module)})


def skeleton(name: str) -> nn.Module:
    """A timm model of two blocks without weights."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name, depth=2)


def refusal(model: nn.Module) -> str | None:
    """Why no adapter takes the model, or None."""
    return adapters.refusal(model)


def rows() -> Iterator[tuple[str, str | None]]:
    """Entrypoint and refusal."""
    for name in entrypoints():
        yield name, refusal(skeleton(name))


def page(found: list[tuple[str, str | None]]) -> str:
    supported = sum(reason is None for _, reason in found)
    modules = "` and `timm.models.".join(MODULES)
    text = HEADER.format(modules=modules, timm=timm.__version__, supported=supported, total=len(found))
    return text + "".join(f"| `{name}` | {'no' if reason else 'yes'} | {reason or ''} |\n" for name, reason in found)


if __name__ == "__main__":
    PAGE.write_text(page(list(rows())))
