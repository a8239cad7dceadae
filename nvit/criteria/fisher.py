"""The Fisher matrix of the gates: mean products of gate gradients over samples, units leaving in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..spec import Group
from .base import Evidence, Scores
from .gates import RecordedGates
from .turns import leave_in_turn

SHRINK = 0.5
"""What products of different units count in `fisher`: of a thousand samples, half of what they say is noise."""


class Fisher(RecordedGates):
    """`leave_in_turn` of the gates' Fisher matrix, its entries between different units shrunk by `SHRINK`. loss²"""

    name = "fisher"

    @staticmethod
    def score(groups: Sequence[Group], batch: Evidence) -> dict[str, Tensor]:
        """Mean over samples of the products of two units' gate gradients, `(group.size, group.size)`."""
        some = batch.gates[groups[0].name]
        here = some.new_full((), len(some), dtype=torch.float64)
        share = batch.over_ranks({"samples": here})["samples"]  # each gate gradient is one of so many
        return batch.over_ranks({g.name: share * batch.gates[g.name].T @ batch.gates[g.name] for g in groups})

    @staticmethod
    def scores(mean: Mapping[str, Tensor]) -> Scores:
        return {name: shrunk_in_turn(t) for name, t in mean.items()}

    @staticmethod
    def memory(groups: Sequence[Group]) -> int:
        return 2 * 4 * sum(g.size**2 for g in groups)


def shrunk_in_turn(products: Tensor) -> Tensor:
    """`leave_in_turn` with the products of different units shrunk by `SHRINK`."""
    products = products.detach().cpu().double()
    diagonal = products.diagonal().diag()
    return leave_in_turn(diagonal + SHRINK * (products - diagonal))
