"""Products of gate gradients: the Fisher matrix of the gates, units leaving in turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..spec import Group
from .base import Evidence, Scores

SHRINK = 0.5
"""What products of different units count in `fisher`: of a thousand samples, half of what they say is noise."""


def gate_products(groups: Sequence[Group], seen: Evidence) -> Scores:
    """Mean over samples of the products of two units' gate gradients, `(group.size, group.size)`. loss²"""
    here = torch.tensor([float(len(seen.gates[groups[0].name]))], dtype=torch.float64)
    share = float(seen.over_ranks({"samples": here})["samples"])  # each gate gradient is one of so many
    return seen.over_ranks({g.name: share * seen.gates[g.name].T @ seen.gates[g.name] for g in groups})


def leave_in_turn(products: Tensor) -> Tensor:
    """Saliency of units that leave one by one, each judged by what is gone already.

    With the Fisher matrix F of the gates in place of the Hessian, removing a set of units costs ½ Σ F over all pairs
    in it (as in optimal brain surgery, Hassibi & Stork 1992, without its update of what stays). The unit that adds
    least leaves next. Its saliency is what it adds, or what an earlier one added if that was more, by a last digit
    apart, so that sorting by saliency gives the order back.

    Args:
        products: F, `(units, units)`, symmetric.

    Returns:
        fp64 `(units,)` on the CPU, in loss².
    """
    pairs = products.detach().cpu().double().numpy()
    adds, saliency, most = pairs.diagonal() / 2, np.empty(len(pairs)), 0.0
    for _ in range(len(pairs)):
        unit = int(adds.argmin())
        most = saliency[unit] = max(adds[unit], np.nextafter(most, np.inf))
        adds += pairs[unit]
        adds[unit] = np.inf
    return torch.from_numpy(saliency)


def shrunk_in_turn(products: Tensor) -> Tensor:
    """`leave_in_turn` with the `gate_products` of different units shrunk by `SHRINK`."""
    products = products.detach().cpu().double()
    diagonal = products.diagonal().diag()
    return leave_in_turn(diagonal + SHRINK * (products - diagonal))
