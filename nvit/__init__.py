"""Prune vision transformers to a latency you choose (NViT, arXiv:2110.04869)."""

from . import zoo
from .about import describe
from .config import FinetuneConfig, PruneConfig
from .data import image_folder
from .evaluate import accuracy
from .finetune import finetune
from .latency import LatencyTable
from .pruner import Pruner
from .run import PruneResult, prune
from .snapshot import BUNDLED
from .sparse24 import load

__version__ = "0.1.0"
__all__ = [
    "BUNDLED",
    "FinetuneConfig",
    "LatencyTable",
    "PruneConfig",
    "PruneResult",
    "Pruner",
    "accuracy",
    "describe",
    "finetune",
    "image_folder",
    "load",
    "prune",
    "zoo",
]
