"""The public functions: one signature for kernel and reference, chosen by device.

Tensors on CUDA in float16, bfloat16 or float32 with widths the kernels take go to Triton; all else goes to
`nvit_kernels.reference`, whose docstrings say what arguments and scores are. Under Triton's interpreter
(`TRITON_INTERPRET=1` before import) CPU tensors take the kernels' code too. Under autocast, attention and MLPs cast
their inputs as torch's own do.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

from nvit_kernels import reference
from nvit_kernels.kept import Kept
from nvit_kernels.plan import DotSlice, GroupDotPlan

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:
    from nvit_kernels.launch import INTERPRET
    from nvit_kernels.ops.attention import attention as fused_attention
    from nvit_kernels.ops.group_dot import group_dot as fused_group_dot
    from nvit_kernels.ops.kept_layer_norm import kept_layer_norm as fused_kept_layer_norm
    from nvit_kernels.ops.mlp import mlp as fused_mlp
    from nvit_kernels.ops.swiglu import swiglu as fused_swiglu

__all__ = ["DotSlice", "GroupDotPlan", "Kept", "attention", "group_dot", "kept_layer_norm", "mlp", "swiglu"]
LARGEST_BATCH = 65535  # of a CUDA grid; windows count
FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def takes_kernels(x: Tensor, *widths: int) -> bool:
    """Whether a call on `x` with these widths runs fused kernels."""
    here = HAS_TRITON and (x.is_cuda or (INTERPRET and x.device.type == "cpu"))
    return here and x.dtype in FUSED_DTYPES and all(width % 8 == 0 for width in widths)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Floating tensors in autocast's dtype where it is on, as `F.linear` would see them."""
    kind = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    heads: Kept | None = None,
    qk: Kept | None = None,
    v_dim: Kept | None = None,
    head_scores: Tensor | None = None,
    qk_scores: Tensor | None = None,
    v_scores: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + bias + mask) v over kept heads and dims, with their scores; see `reference.attention`."""
    q, k, v = _autocast(q, k, v)
    widest = max(q.shape[-1], v.shape[-1])
    fits = widest <= (64 if q.is_cuda and q.dtype == torch.float32 else 256)  # a float32 tile is twice the memory
    fits &= len(q) <= LARGEST_BATCH
    fused = fits and takes_kernels(q, q.shape[-1], v.shape[-1])
    run = fused_attention if fused else reference.attention
    return run(q, k, v, scale, heads, qk, v_dim, head_scores, qk_scores, v_scores, bias, mask)


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    hidden: Kept | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """fc2(GELU(fc1(x))) over kept hidden units, with their scores; see `reference.mlp`."""
    x, w1, b1, w2, b2 = _autocast(x, w1, b1, w2, b2)
    run = fused_mlp if takes_kernels(x, *w1.shape, w2.shape[0]) else reference.mlp
    return run(x, w1, b1, w2, b2, hidden, scores)


def swiglu(
    x: Tensor,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_value: Tensor,
    b_value: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    hidden: Kept | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """fc2(SiLU(gate(x)) · value(x)) over kept hidden units, with their scores; see `reference.swiglu`."""
    x, *weights = _autocast(x, w_gate, b_gate, w_value, b_value, w2, b2)
    run = fused_swiglu if takes_kernels(x, *w_gate.shape, w2.shape[0]) else reference.swiglu
    return run(x, *weights, hidden, scores)


def kept_layer_norm(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    keep: Kept | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over kept channels, with the residual add and their scores; see `reference.kept_layer_norm`.

    A missing bias counts as zeros; an x and a residual of two dtypes are added in the wider one.
    """
    b = torch.zeros_like(w) if b is None else b
    if residual is not None and residual.dtype != x.dtype:
        wider = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wider), residual.to(wider)
    run = fused_kept_layer_norm if takes_kernels(x) else reference.kept_layer_norm
    return run(x, w, b, keep, eps, residual, scores)


def group_dot(
    params: Mapping[str, Tensor], grads: Mapping[str, Tensor], plan: GroupDotPlan, *, scale: float | Tensor = 1.0
) -> Tensor:
    """Σ scale · w·∂w of every unit that `plan` declares; see `reference.group_dot`. Bitwise repeatable."""
    run = fused_group_dot if takes_kernels(next(iter(params.values()))) else reference.group_dot
    return run(params, grads, plan, scale=scale)
