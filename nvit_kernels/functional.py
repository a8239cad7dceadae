"""The public functions: one signature for kernel and plain torch, and for each op the one rule that chooses.

A tensor on CUDA in float16, bfloat16 or float32, with widths that the op's kernels take, goes to Triton; all else goes
to plain torch, but merged tokens on a CPU, where no gradient is wanted, to compiled code. `<op>_takes` is the rule for
Triton: an engine that asks beforehand gets the same answer as the op itself. What arguments and scores are is said by
`nvit_kernels.reference`. Under Triton's interpreter (`TRITON_INTERPRET=1` before import) CPU tensors take the kernels'
code too. Under autocast, attention and MLPs cast their inputs as torch's own do.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

from nvit_kernels import reference
from nvit_kernels.kept import Kept
from nvit_kernels.ops.attention.reference import fallback as plain_attention
from nvit_kernels.ops.group_dot.plan import DotSlice, GroupDotPlan
from nvit_kernels.ops.merge_tokens import native as native_merge
from nvit_kernels.ops.merge_tokens.reference import unmerge_tokens

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:
    from nvit_kernels.launch import INTERPRET
    from nvit_kernels.ops.attention.op import attention as fused_attention
    from nvit_kernels.ops.attention.short import attention_short as short_attention
    from nvit_kernels.ops.attention.short import takes as short_takes
    from nvit_kernels.ops.group_dot.op import group_dot as fused_group_dot
    from nvit_kernels.ops.kept_layer_norm.op import kept_layer_norm as fused_kept_layer_norm
    from nvit_kernels.ops.merge_tokens.op import MOST_TOKENS, WIDEST_KEY
    from nvit_kernels.ops.merge_tokens.op import merge_tokens as fused_merge_tokens
    from nvit_kernels.ops.mlp.op import mlp as fused_mlp
    from nvit_kernels.ops.swiglu.op import swiglu as fused_swiglu

__all__ = [
    "DotSlice",
    "GroupDotPlan",
    "Kept",
    "attention",
    "attention_takes",
    "attention_takes_mass",
    "group_dot",
    "group_dot_takes",
    "kept_layer_norm",
    "kept_layer_norm_takes",
    "merge_tokens",
    "merge_tokens_takes",
    "mlp",
    "mlp_takes",
    "swiglu",
    "unmerge_tokens",
]
FEWEST_HEADS = 256  # of all images together, for the kernels of one program a head: two for each processor
LARGEST_BATCH = 65535  # of a CUDA grid; windows count
WIDEST_HEAD = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 64}  # on a GPU: a float32 tile is twice as large


def _here(x: Tensor) -> bool:
    """Whether kernels run where `x` is: on CUDA, or on a CPU under Triton's interpreter."""
    return HAS_TRITON and (x.is_cuda or (INTERPRET and x.device.type == "cpu"))


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an op that autocast casts sees `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def attention_takes(q: Tensor, v_width: int) -> bool:
    """Whether `attention` runs fused on queries `(batch, heads, tokens, qk_dim)` with values `v_width` wide."""
    if not _here(q) or q.dim() != 4:
        return False
    dtype, batch, width = _autocast_dtype(q), q.shape[0], q.shape[3]
    widest = WIDEST_HEAD.get(dtype, 0) if q.is_cuda or dtype not in WIDEST_HEAD else max(WIDEST_HEAD.values())
    return max(width, v_width) <= widest and batch <= LARGEST_BATCH and width % 8 == v_width % 8 == 0


def attention_is_short(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` without lists, bias or mask takes the kernels of one program a head, with a mass or without.

    They are for rows of at most 208 tokens, enough heads to fill a GPU, and, where gradients are wanted, heads of 32
    dims at least: at 24 dims the backward of a program a tile was measured faster (H200, 181 against 170 µs).
    """
    if not (HAS_TRITON and q.is_cuda) or q.shape[0] * q.shape[1] < FEWEST_HEADS:
        return False
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if wanted and min(q.shape[-1], v.shape[-1]) < 32:
        return False
    return short_takes(q, v.shape[-1], wanted)


def attention_takes_mass(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` with a mass and nothing else added runs fused: only where rows are short."""
    return attention_takes(q, v.shape[-1]) and attention_is_short(q, k, v)


def mlp_takes(x: Tensor, *widths: int) -> bool:
    """Whether `mlp` and `swiglu` run fused on `x`; `widths` are those of input, hidden units and output."""
    return _here(x) and _autocast_dtype(x) in WIDEST_HEAD and all(width % 8 == 0 for width in widths)


def kept_layer_norm_takes(x: Tensor) -> bool:
    """Whether `kept_layer_norm` runs fused on `x`, of any width."""
    return _here(x) and x.dtype in WIDEST_HEAD


def merge_tokens_takes(x: Tensor, keys: Tensor, prefix: int) -> bool:
    """Whether `merge_tokens` runs fused on x: all tokens of an image have to fit one program."""
    if not _here(x) or x.dtype not in WIDEST_HEAD:
        return False
    return 0 < x.shape[1] - prefix <= MOST_TOKENS and keys.shape[-1] <= WIDEST_KEY


def group_dot_takes(param: Tensor) -> bool:
    """Whether `group_dot` runs fused on a model with parameters such as `param`."""
    return _here(param) and param.dtype in WIDEST_HEAD


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
    mass: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + bias + mask + mass) v over kept heads and dims; see `reference.attention`.

    Only the kernels of short rows add a mass. Elsewhere one takes torch's way: the other kernels would want a mask of
    `(batch, tokens, tokens)`, every row of it the same, and read it whole for every head.
    """
    fused = attention_takes(q, v.shape[-1])
    q, k, v = _autocast(q, k, v)
    if fused and all(extra is None for extra in (heads, qk, v_dim, bias, mask)) and attention_is_short(q, k, v):
        return short_attention(q, k, v, scale, head_scores, qk_scores, v_scores, mass)
    if fused and mass is None:
        return fused_attention(q, k, v, scale, heads, qk, v_dim, head_scores, qk_scores, v_scores, bias, mask)
    return plain_attention(q, k, v, scale, heads, qk, v_dim, head_scores, qk_scores, v_scores, bias, mask, mass)


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
    run = fused_mlp if mlp_takes(x, *w1.shape, w2.shape[0]) else reference.mlp
    x, w1, b1, w2, b2 = _autocast(x, w1, b1, w2, b2)
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
    run = fused_swiglu if mlp_takes(x, *w_gate.shape, w2.shape[0]) else reference.swiglu
    x, *weights = _autocast(x, w_gate, b_gate, w_value, b_value, w2, b2)
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

    An x and a residual of two dtypes are added in the wider one.
    """
    if residual is not None and residual.dtype != x.dtype:
        wider = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wider), residual.to(wider)
    run = fused_kept_layer_norm if kept_layer_norm_takes(x) else reference.kept_layer_norm
    return run(x, w, b, keep, eps, residual, scores)


def group_dot(
    params: Mapping[str, Tensor], grads: Mapping[str, Tensor], plan: GroupDotPlan, *, scale: float | Tensor = 1.0
) -> Tensor:
    """Σ scale · w·∂w of every unit that `plan` declares; see `reference.group_dot`. Bitwise repeatable."""
    run = fused_group_dot if group_dot_takes(next(iter(params.values()))) else reference.group_dot
    return run(params, grads, plan, scale=scale)


def merge_tokens(
    x: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The `r` tokens of every image most like another merged into it; see `reference.merge_tokens`."""
    plain = native_merge.merge_tokens if native_merge.takes(x, keys, sizes) else reference.merge_tokens
    run = fused_merge_tokens if merge_tokens_takes(x, keys, prefix) else plain
    return run(x, keys, sizes, r, prefix)
