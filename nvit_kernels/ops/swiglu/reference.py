"""The gated MLP over kept hidden units in plain torch: the definition, and what runs where the kernels do not."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nvit_kernels.kept import Kept
from nvit_kernels.ops.mlp.reference import scored
from nvit_kernels.ops.over_kept import take, take_bias


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
    """fc2(SiLU(gate(x)) · value(x)) over kept hidden units; otherwise as `mlp`.

    Args:
        w_gate, b_gate, w_value, b_value: `(hidden, in)`, `(hidden,)` each; halves of a packed weight may be views.
    """
    gate = F.linear(x, take(w_gate, hidden, 0), take_bias(b_gate, hidden))
    value = F.linear(x, take(w_value, hidden, 0), take_bias(b_value, hidden))
    return F.linear(scored(F.silu(gate) * value, hidden, scores), take(w2, hidden, 1), b2)
