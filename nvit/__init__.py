"""Prune vision transformers to a latency you choose (NViT, arXiv:2110.04869)."""

from . import adapters, data, snapshot, sparse24, zoo
from .about import describe
from .analysis.evaluate import accuracy
from .config import FinetuneConfig, PruneConfig
from .latency.table import LatencyTable
from .prune.api import prune
from .prune.pruner import Pruner
from .prune.result import PruneResult
from .serve import graphed
from .structure.snapshot import BUNDLED, load
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
    "image_folder",
    "load",
    "prune",
    "snapshot",
    "sparse24",
    "zoo",
]
