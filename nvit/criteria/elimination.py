"""Backward elimination: units leave one after another, and those that stay take over what they predict of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class _Problem:
    """One place where the units live.

    Attributes:
        precision: inverse covariance of the dims that are left, `(d, d)`; rows of those that left are of the identity.
        root: R `(rank, d)` with Rᵀ R the curvature, carried over to what stays; zero where dims left.
        dims: of each unit, `(units, dims of a unit)`.
    """

    def __init__(self, covariance: Tensor, curvature: Tensor, dims: Tensor, ridge: float) -> None:
        c, d = covariance, len(covariance)
        c = c + ridge * float(c.diagonal().mean().clamp_min(1e-300)) * torch.eye(d).to(c)
        values, vectors = torch.linalg.eigh(curvature)
        self.precision = torch.linalg.inv(c)
        self.root = (values.clamp_min(0).sqrt() * vectors).T.clone()
        self.dims = dims.to(c.device)

    def costs(self, units: Tensor) -> Tensor:
        """Loss that each of `units` alone adds by leaving now, fp64 `(len(units),)` on the CPU."""
        own = self.dims[units]
        block = self.precision[own[:, :, None], own[:, None, :]]
        mine = self.root[:, own.flatten()].unflatten(1, own.shape).movedim(1, 0)  # (units, rank, dims of a unit)
        energy = mine.transpose(1, 2) @ mine
        return torch.linalg.solve(block, energy).diagonal(dim1=-2, dim2=-1).sum(-1).cpu()

    def remove(self, units: Tensor) -> None:
        """Condition on `units` being gone, together."""
        own = self.dims[units].flatten()
        columns = self.precision[:, own].clone()
        pivot = torch.linalg.inv(columns[own])
        self.root -= self.root[:, own].clone() @ pivot @ columns.T
        self.precision -= columns @ pivot @ columns.T
        # Units that left stay invertible and cost nothing.
        self.root[:, own] = 0
        self.precision[own], self.precision[:, own] = 0, 0
        self.precision[own, own] = 1


def eliminate(
    problems: Sequence[tuple[Tensor, Tensor, Tensor]], units: int, *, chunk: int = 1, ridge: float = 1e-3
) -> Tensor:
    """Costs of units that leave one after another (`chunk` at a time), the cheapest first.

    Args:
        problems: places where the units live: covariance `(d, d)`, curvature `(d, d)`, and each unit's dims.
        ridge: added to the covariance, in units of its mean variance.

    Returns:
        fp64 `(units,)`, the loss each adds when it leaves, made to ascend.
    """
    places = [_Problem(covariance, curvature, dims, ridge) for covariance, curvature, dims in problems]
    alive = torch.ones(units, dtype=torch.bool)
    costs, floor = torch.zeros(units, dtype=torch.float64), 0.0
    while bool(alive.any()):
        left = alive.nonzero().squeeze(1)
        now = torch.zeros(len(left), dtype=torch.float64)
        for place in places:
            now += place.costs(left)
        first = now.argsort()[:chunk]
        for j in first:
            floor = max(floor, float(now[j]))
            costs[left[j]] = floor
        gone = left[first]
        alive[gone] = False
        for place in places:
            place.remove(gone)
    return costs
