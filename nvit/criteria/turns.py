"""Units that leave in turn, each judged by what is gone already: from a matrix of products to saliencies."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def leave_in_turn(products: Tensor) -> Tensor:
    """Saliency of units that leave one by one, each judged by what is gone already.

    With F, the Fisher or Gauss-Newton matrix of the gates, in place of the Hessian, removing a set of units costs ½ Σ F
    over all pairs in it (as in optimal brain surgery, Hassibi & Stork 1992, without its update of what stays). The unit
    that adds least leaves next. Its saliency is what it adds, or what an earlier one added if that was more, by a last
    digit apart, so that sorting by saliency gives the order back.

    Args:
        products: F, `(units, units)`, symmetric.

    Returns:
        fp64 `(units,)` on the CPU, in loss² for the Fisher matrix, in loss for the Gauss-Newton one.
    """
    pairs = products.detach().cpu().double().numpy()
    adds, saliency, most = pairs.diagonal() / 2, np.empty(len(pairs)), 0.0
    for _ in range(len(pairs)):
        unit = int(adds.argmin())
        most = saliency[unit] = max(adds[unit], np.nextafter(most, np.inf))
        adds += pairs[unit]
        adds[unit] = np.inf
    return torch.from_numpy(saliency)
