"""Every op in plain torch, differentiable, in any dtype: what the kernels must match. Each lives beside its kernels."""

from nvit_kernels.ops.attention.reference import attention
from nvit_kernels.ops.group_dot.reference import group_dot
from nvit_kernels.ops.kept_layer_norm.reference import kept_layer_norm
from nvit_kernels.ops.merge_tokens.reference import merge_tokens, unmerge_tokens
from nvit_kernels.ops.mlp.reference import mlp
from nvit_kernels.ops.swiglu.reference import swiglu

__all__ = ["attention", "group_dot", "kept_layer_norm", "merge_tokens", "mlp", "swiglu", "unmerge_tokens"]
