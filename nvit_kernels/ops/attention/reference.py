"""Attention over kept heads and dims in plain torch: the definition, and what runs where the kernels do not."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from nvit_kernels.kept import Kept
from nvit_kernels.ops.over_kept import on_gradient, spread, take, wide


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
    """softmax(scale · q kᵀ + bias + mask + mass) v over kept heads and dims; what is pruned comes out as exact zeros.

    Scores are of the gates that would stand on the units, so sums of value · gradient over tokens (and heads):
    `head_scores` Σ o·∂o of each head, `v_scores` Σ o·∂o of each v dim, `qk_scores` Σ q·∂q of each qk dim. The backward
    adds them to float32 buffers `(batch, units)`, per sample, or `(units,)`, summed over the batch.

    Args:
        q, k: `(batch, heads, tokens, qk_dim)`.
        v: `(batch, heads, tokens, v_dim)`; `v_dim` need not equal `qk_dim`.
        scale: factor on the logits; after pruning still the dense model's.
        heads, qk, v_dim: kept units, None keeps all. One list of qk (v) dims serves all heads.
        bias: `(heads, tokens, tokens)` added to every sample's logits, float32 or of q's dtype; differentiable.
        mask: `(windows, tokens, tokens)` of the same dtypes, added to sample i's logits from window i modulo windows;
            a constant. It may hold -inf, but no row of -inf alone.
        mass: float32 `(batch, tokens)` added to every logit of a key, the log of how many tokens it stands for; a
            constant.

    Returns:
        `(batch, heads, tokens, v_dim)`, a view of `(batch, tokens, heads, v_dim)` memory.

    Raises:
        ValueError: shapes or dtypes disagree, or the windows do not divide the batch.
    """
    return _over_kept(_by_definition, q, k, v, scale, heads, qk, v_dim, head_scores, qk_scores, v_scores, bias, mask,
                      mass)  # fmt: skip


def fallback(q, k, v, scale, heads=None, qk=None, v_dim=None, head_scores=None, qk_scores=None, v_scores=None,
             bias=None, mask=None, mass=None):  # fmt: skip
    """`attention` through torch's `scaled_dot_product_attention`, with no `(tokens, tokens)` matrix where torch can."""
    return _over_kept(_by_sdpa, q, k, v, scale, heads, qk, v_dim, head_scores, qk_scores, v_scores, bias, mask,
                      mass)  # fmt: skip


Attend = Callable[[Tensor, Tensor, Tensor, float, Tensor | None, Tensor | None, Tensor | None], Tensor]


def _over_kept(
    attend: Attend, q, k, v, scale, heads, qk, v_dim, head_scores, qk_scores, v_scores, bias, mask, mass
) -> Tensor:
    q_kept = take(take(q, heads, 1), qk, 3)
    k_kept = take(take(k, heads, 1), qk, 3)
    v_kept = take(take(v, heads, 1), v_dim, 3)

    def q_score(grad):
        return spread(wide(q_kept.detach() * grad).sum((1, 2)), qk, 1)

    scored = on_gradient(q_kept, qk_scores, q_score)
    out = attend(scored, k_kept, v_kept, scale, None if bias is None else take(bias, heads, 0), mask, mass)

    def o_score(dims, kept):
        return lambda grad: spread(wide(value * grad).sum(dims), kept, 1)

    value = out.detach()
    out = on_gradient(out, head_scores, o_score((2, 3), heads))
    out = on_gradient(out, v_scores, o_score((1, 2), v_dim))
    return spread(spread(out, heads, 1), v_dim, 3).transpose(1, 2).contiguous().transpose(1, 2)


def _by_definition(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, mask: Tensor | None, mass: Tensor | None
) -> Tensor:
    logits = q @ k.transpose(-2, -1) * scale
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = (logits.unflatten(0, (-1, len(mask))) + mask.detach().unsqueeze(1)).flatten(0, 1)
    if mass is not None:
        logits = logits + mass.detach()[:, None, None, :]
    return logits.softmax(-1).to(v.dtype) @ v


def _by_sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, mask: Tensor | None, mass: Tensor | None
) -> Tensor:
    qk_dim, v_dim = q.shape[-1], v.shape[-1]
    if qk_dim != v_dim and q.device.type == "cpu":
        # The fused CPU kernel wants one width: zero columns add nothing to the logits or are cut off again.
        widest = max(qk_dim, v_dim)
        q, k, v = (F.pad(t, (0, widest - t.shape[-1])) for t in (q, k, v))
    added = None if bias is None else bias.unsqueeze(0)
    if mask is not None:
        each = mask.detach().repeat(len(q) // len(mask), 1, 1).unsqueeze(1)
        added = each if added is None else added + each
    if mass is not None:
        of_keys = mass.detach()[:, None, None, :]
        added = of_keys.to(q.dtype) if added is None else added + of_keys
    if added is not None and q.is_cuda:
        added = added.to(q.dtype)  # CUDA's fused kernels read one dtype
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)
    return out[..., :v_dim]
