"""Prunable layers: parameters plus one call into `nvit.functional`. Masked and compact models share them.

A layer knows where its axes lie in its own parameters and declares these slices; an adapter says which group prunes
each axis. Parameter names are the host's, and buffers are not saved: a masked model's state dict looks like the dense
model's.
"""

from .absent import Absent
from .attention import Attention, head_layout
from .base import Layout, Prunable, keep_, prunable_layers
from .merging import MergingStack
from .mlp import GatedMlp, Mlp
from .sites import Basis, LinearPart, Site
from .stream import EmbeddingNorm, LayerScale, Linear, Norm, RestoringNorm, StreamEntry

__all__ = [
    "Absent",
    "Attention",
    "Basis",
    "EmbeddingNorm",
    "GatedMlp",
    "LayerScale",
    "Layout",
    "Linear",
    "LinearPart",
    "MergingStack",
    "Mlp",
    "Norm",
    "Prunable",
    "RestoringNorm",
    "Site",
    "StreamEntry",
    "head_layout",
    "keep_",
    "prunable_layers",
]
