"""Prune vision transformers to a latency you choose (NViT, arXiv:2110.04869)."""

from .config import FinetuneConfig, PruneConfig
from .evaluate import accuracy
from .finetune import finetune
from .latency import LatencyTable
from .pruner import Pruner, PruneResult, prune
from .snapshot import load

__version__ = "0.1.0"
__all__ = [
    "FinetuneConfig",
    "LatencyTable",
    "PruneConfig",
    "PruneResult",
    "Pruner",
    "accuracy",
    "finetune",
    "load",
    "prune",
]
