"""The MLP over kept hidden units in plain torch: the definition, and what runs where the kernels do not."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nvit_kernels.kept import Kept
from nvit_kernels.ops.over_kept import on_gradient, per_sample, spread, take, take_bias


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    hidden: Kept | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """fc2(GELU(fc1(x))) over kept hidden units, with the exact erf GELU.

    The backward adds Σ a·∂a over tokens, a the activation, to `scores`: float32 `(batch, hidden)`, per sample (the
    leading dim of x), or `(hidden,)`. It equals Σ w·∂w over the columns of `w2`.

    Args:
        x: `(batch, ..., in)`.
        w1, b1: `(hidden, in)`, `(hidden,)`.
        w2, b2: `(out, hidden)`, `(out,)`.
        hidden: kept hidden units, None keeps all. Pruned rows of w1, b1 and columns of w2 are never read.

    Returns:
        `(batch, ..., out)`.

    Raises:
        ValueError: shapes disagree; on CUDA also widths that are no multiple of 8.
    """
    activation = F.gelu(F.linear(x, take(w1, hidden, 0), take_bias(b1, hidden)))
    return F.linear(scored(activation, hidden, scores), take(w2, hidden, 1), b2)


def scored(activation: Tensor, hidden: Kept | None, scores: Tensor | None) -> Tensor:
    """The kept activations, whose gradient adds each unit's score to `scores`."""
    value = activation.detach()
    return on_gradient(activation, scores, lambda grad: spread(per_sample(value * grad), hidden, 1))
