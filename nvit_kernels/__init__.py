"""Fused kernels for vision transformers. Needs torch and triton alone; never imports nvit.

`functional` holds the functions, `fuse` and `unfuse` swap fused layers in a timm model and back.
"""

from nvit_kernels.hosts.fuse import collect_scores_, fuse, keep_, unfuse
from nvit_kernels.kept import Kept

__all__ = ["Kept", "collect_scores_", "fuse", "keep_", "unfuse"]
