"""Prune vision transformers to a latency you choose (NViT, arXiv:2110.04869)."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import adapters, data, hub, snapshot, sparse24, zoo
    from .about import describe
    from .analysis.evaluate import accuracy
    from .config import FinetuneConfig, PruneConfig
    from .latency.table import LatencyTable
    from .prune.api import prune
    from .prune.pruner import Pruner
    from .prune.result import PruneResult
    from .serve import graphed
    from .snapshot import BUNDLED, load
    from .training.finetune import finetune
    from .training.images import image_folder

__version__ = "0.1.0"
__all__ = [
    "BUNDLED",
    "FinetuneConfig",
    "LatencyTable",
    "PruneConfig",
    "PruneResult",
    "Pruner",
    "accuracy",
    "adapters",
    "data",
    "describe",
    "finetune",
    "graphed",
    "hub",
    "image_folder",
    "load",
    "prune",
    "snapshot",
    "sparse24",
    "zoo",
]

_HOMES = {
    "BUNDLED": "snapshot",
    "FinetuneConfig": "config",
    "LatencyTable": "latency.table",
    "PruneConfig": "config",
    "PruneResult": "prune.result",
    "Pruner": "prune.pruner",
    "accuracy": "analysis.evaluate",
    "describe": "about",
    "finetune": "training.finetune",
    "graphed": "serve",
    "image_folder": "training.images",
    "load": "snapshot",
    "prune": "prune.api",
}
"""Where names of `__all__` live that are not modules of this package themselves."""


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """What `__all__` names, imported when it is first asked for: torch and timm take seconds."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
        found = getattr(home, name) if name in _HOMES else home
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`nvit.prune` is the function, also once something out of the room of that name was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
