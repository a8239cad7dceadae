"""2:4 sparsity of a compact model's projections (the paper's Sec. 3.2.3): masks, channel order, sparse tensors on GPUs.

Weights keep their dense shape with zeros where the mask is not, so that a snapshot runs anywhere. On a GPU with sparse
tensor cores `accelerate_` replaces them by compressed ones, layer by layer, where that was measured to be faster.
"""

from .backends import DENSE, MASKED, Choice, accelerate_, backends, choose, measure
from .kernels import CUSPARSELT, CUTLASS, compressed, native
from .layerwise import DAMPING, choose_by_curvature_
from .masks import MULTIPLE, apply_masks_, masks_2to4, projections, refusal
from .order import permute_

__all__ = [
    "CUSPARSELT",
    "CUTLASS",
    "DAMPING",
    "DENSE",
    "MASKED",
    "MULTIPLE",
    "Choice",
    "accelerate_",
    "apply_masks_",
    "backends",
    "choose",
    "choose_by_curvature_",
    "compressed",
    "masks_2to4",
    "measure",
    "native",
    "permute_",
    "projections",
    "refusal",
]
