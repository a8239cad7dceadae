"""LayerNorm over kept channels in plain torch: the definition, and what runs where the kernels do not."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nvit_kernels.kept import Kept
from nvit_kernels.ops.over_kept import on_gradient, per_sample, spread, take, take_bias


def kept_layer_norm(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    keep: Kept | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm whose statistics are over kept channels; pruned channels come out as exact zeros.

    With `residual`, norms `x + residual` and returns that sum too. The backward adds Σ y·∂y over tokens, y the output,
    to `scores`, float32 `(batch, width)` or `(width,)`: what removing a channel takes from all readers of this norm.

    Args:
        x, residual: `(batch, ..., width)`.
        w: `(width,)`.
        b: `(width,)`; None shifts nothing.
        keep: kept channels, None keeps all.

    Returns:
        y like x; with `residual` the pair (y, x + residual).

    Raises:
        ValueError: shapes disagree.
    """
    total = x if residual is None else x + residual
    kept_x, kept_w, kept_b = take(total, keep, -1), take(w, keep, 0), take_bias(b, keep)
    y = F.layer_norm(kept_x, kept_w.shape, kept_w.to(x.dtype), None if b is None else kept_b.to(x.dtype), eps)
    value = y.detach()
    y = on_gradient(y, scores, lambda grad: spread(per_sample(value * grad), keep, 1))
    y = spread(y, keep, y.dim() - 1)
    return y if residual is None else (y, total)
