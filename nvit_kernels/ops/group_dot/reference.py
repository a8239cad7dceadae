"""Σ w·∂w of declared units in plain torch: the definition, and what runs where the kernels do not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nvit_kernels.ops.group_dot.plan import GroupDotPlan


def group_dot(
    params: Mapping[str, Tensor], grads: Mapping[str, Tensor], plan: GroupDotPlan, *, scale: float | Tensor = 1.0
) -> Tensor:
    """Σ scale · w·∂w of every unit that `plan` declares, over whole parameters at once.

    Args:
        params: parameters by name; every name in the plan must be there.
        grads: loss gradients with the same keys and shapes.
        plan: a `GroupDotPlan`.
        scale: a number, or a tensor of one element; 1 / loss scale under AMP.

    Returns:
        `(plan.outputs,)`: float32, or float64 where the parameters are.

    Raises:
        KeyError: a slice names a parameter without a gradient.
        ValueError: a shape differs from the plan's, or (on CUDA) dtypes are mixed.
    """
    plan.check(params, grads)
    first = params[plan.slices[0].name]
    out = first.new_zeros(plan.outputs, dtype=torch.float64 if first.dtype == torch.float64 else torch.float32)
    for s in plan.slices:
        product = (params[s.name].to(out.dtype) * grads[s.name].to(out.dtype))[s.start : s.stop].reshape(s.view)
        out[s.offset : s.offset + s.units] += product.movedim(s.axis, 0).reshape(s.units, -1).sum(1)
    return out * scale
