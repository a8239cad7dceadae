"""Loss that stays after a unit is removed and its readers are refitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..calibration.capture import Place
from ..calibration.statistics import Seen
from ..spec import Group
from .curvature import _dims, _places, _wide


def remaining_loss(
    model: nn.Module, groups: Sequence[Group], masks: Mapping[str, Tensor], seen: Mapping[Place, Seen]
) -> dict[str, Tensor]:
    """Loss that stays after a unit is removed and its readers are refitted, by group `(group.size,)`.

    Units of a group leave one after another, the cheapest first. What a unit costs is the curvature times the part of
    it that the kept ones do not predict linearly, as in the optimal brain surgeon (Hassibi & Stork 1993) with the
    weights replaced by what the loss minds about the activation. Query/key dims have no linear reader: their cost is
    curvature times mean square. Scores ascend in the order of leaving, so that sums over a prefix are its cost.

    Raises:
        ValueError: a group at none of whose places a gradient was seen.
    """
    places, scores = _places(model, groups, seen), {}
    for g in groups:
        narrow = _cost(g, int(masks[g.name].sum()), [seen[place] for place in places[g.name]])
        scores[g.name] = _wide(g, masks[g.name], narrow)
    return scores


def _cost(group: Group, units: int, seen: Sequence[Seen]) -> Tensor:
    if group.kind == "qk_dim":
        total = sum(s.curvature.diagonal() * s.xx.diagonal() / s.rows for s in seen)
        return total[_dims("qk_dim", units, len(total))].sum(1).cpu()
    problems = [(s.covariance, s.curvature, _dims(group.kind, units, len(s.x))) for s in seen]
    return eliminate(problems, units, chunk=max(1, units // 96))


def eliminate(problems: Sequence[tuple[Tensor, Tensor, Tensor]], units: int, *, chunk: int = 1, ridge: float = 1e-3):
    """Costs of units that leave one after another (`chunk` at a time), the cheapest first.

    Args:
        problems: places where the units live: covariance `(d, d)`, curvature `(d, d)`, and each unit's dims.
        ridge: added to the covariance, in units of its mean variance.

    Returns:
        fp64 `(units,)`, the loss each adds when it leaves, made to ascend.
    """
    state = []
    for covariance, curvature, dims in problems:
        c = covariance + ridge * float(covariance.diagonal().mean().clamp_min(1e-300)) * torch.eye(len(covariance)).to(
            covariance
        )
        values, vectors = torch.linalg.eigh(curvature)
        root = (values.clamp_min(0).sqrt() * vectors).T
        state.append([torch.linalg.inv(c), root.clone(), dims.to(c.device)])
    alive = torch.ones(units, dtype=torch.bool)
    costs, floor = torch.zeros(units, dtype=torch.float64), 0.0
    while bool(alive.any()):
        left = alive.nonzero().squeeze(1)
        now = torch.zeros(len(left), dtype=torch.float64)
        for precision, root, dims in state:
            own = dims[left]
            block = precision[own[:, :, None], own[:, None, :]]
            mine = root[:, own.flatten()].unflatten(1, own.shape).movedim(1, 0)  # (left, rank, dims)
            energy = mine.transpose(1, 2) @ mine
            now += torch.linalg.solve(block, energy).diagonal(dim1=-2, dim2=-1).sum(-1).cpu()
        first = now.argsort()[:chunk]
        for j in first:
            floor = max(floor, float(now[j]))
            costs[left[j]] = floor
        gone = left[first]
        alive[gone] = False
        for s in state:
            own = s[2][gone].flatten()
            columns = s[0][:, own].clone()
            pivot = torch.linalg.inv(columns[own])
            s[1] -= s[1][:, own].clone() @ pivot @ columns.T
            s[0] -= columns @ pivot @ columns.T
            # Units that left stay invertible and cost nothing.
            s[1][:, own] = 0
            s[0][own], s[0][:, own] = 0, 0
            s[0][own, own] = 1
    return costs
