"""What is added to the logits of attention: a bias of the position and a mask, as one kernel or another wants them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def per_head_and_window(
    q: Tensor, bias: Tensor | None, attn_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None] | None:
    """What the fused kernel adds: a bias `(heads, tokens, tokens)` and a mask `(windows, tokens, tokens)`.

    None where the two are not of this form: a boolean mask, one that differs by image and head, or is learned.
    """
    batch, heads, tokens, _ = q.shape
    square = (tokens, tokens)
    bias = None if bias is None else bias.view(heads, *square)
    if attn_mask is None:
        return bias, None
    if not attn_mask.is_floating_point():
        return None
    if attn_mask.shape in ((heads, *square), (1, heads, *square)):
        of_heads = attn_mask.reshape(heads, *square)
        return of_heads if bias is None else bias + of_heads, None
    windows = attn_mask.shape[0] if attn_mask.dim() == 4 else 1
    if attn_mask.shape != (windows, 1, *square) or batch % windows or attn_mask.requires_grad:
        return None
    return bias, attn_mask.squeeze(1)


def of_keys(mass: Tensor, q: Tensor) -> Tensor:
    """The mask `(batch, 1, 1, tokens)` that adds `mass` `(batch, tokens)` to every logit of a key, in q's dtype.

    CUDA's attention reads masks 8 numbers at a time and copies one whose rows begin elsewhere, so there they lie
    a multiple of 8 apart. A graph that is compiled or exported says only what is added.
    """
    mask, tokens = mass.to(q.dtype)[:, None, None, :], mass.shape[1]
    if not q.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing() or tokens % 8 == 0:
        return mask
    return F.pad(mask, (0, -tokens % 8))[..., :tokens]


def one_mask(batch: int, bias: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """Bias and mask as one that broadcasts to `(batch, heads, tokens, tokens)`."""
    if attn_mask is not None and attn_mask.dim() == 4 and (windows := attn_mask.shape[0]) > 1:
        # Asks nothing of the batch, which an exported graph leaves open.
        attn_mask = attn_mask.expand(batch // windows, *attn_mask.shape).flatten(0, 1)
    if bias is None or attn_mask is None:
        return attn_mask if bias is None else bias
    if attn_mask.dtype == torch.bool:
        return bias.masked_fill(~attn_mask, -torch.inf)
    return bias + attn_mask
