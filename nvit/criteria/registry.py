"""Every criterion by name, and which of them a run takes where it is told `auto`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..utils.registry import Registry

if TYPE_CHECKING:
    from .base import Criterion

_HOMES = {
    "curvature": "curvature.Curvature",
    "remaining": "remaining.Remaining",
    "hessian": "gates.Hessian",
    "nvit": "gates.Nvit",
    "abs": "gates.Absolute",
    "fisher": "fisher.Fisher",
    "taylor": "weights.Taylor",
    "magnitude": "weights.Magnitude",
    "random": "weights.Random",
}
"""File and class of each criterion, by the class's own `name`."""

CRITERIA: Mapping[str, type[Criterion]] = Registry(__package__, _HOMES)


def automatic(*, train: bool, refit: bool = False, budget: bool = False, ranks: int = 1) -> str:
    """The criterion of a run that names none.

    While training `hessian`, on whose scale the published price of latency is. Before a refit the loss that remains
    after it (docs/refit.md). One shot `curvature`, which stays nearest to the dense model (docs/saliency.md), or
    `fisher` where memory is bounded or several processes score.
    """
    if train:
        return "hessian"
    if refit:
        return "remaining"
    return "fisher" if budget or ranks > 1 else "curvature"


def refusal(name: str, *, train: bool = False, budget: str = "", ranks: int = 1) -> str | None:
    """Why a criterion does not work in such a run, in one line that says what to do; None where it does."""
    can = CRITERIA[name].capabilities
    if train and not can.training:
        return f"criterion {name} is for pruning without training; add --no-train (train = false)"
    if budget and not can.budget:
        return (
            f"budget {budget} does not bound criterion {name}, which holds two matrices for every group; leave out "
            "--budget, or take criterion fisher"
        )
    if ranks > 1 and not can.ranks:
        return f"criterion {name} runs in one process, not in {ranks}; start without torchrun, or take criterion fisher"
    return None
