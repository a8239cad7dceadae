"""Every criterion that is observed batch by batch, by name."""

from __future__ import annotations

from .base import Criterion
from .fisher import gate_products, shrunk_in_turn
from .gates import absolute, hessian, nvit
from .weights import magnitude, random, taylor

CRITERIA: dict[str, Criterion] = {
    "hessian": Criterion(hessian, "either"),
    "nvit": Criterion(nvit, "weights"),
    "abs": Criterion(absolute, "gates"),
    "fisher": Criterion(gate_products, "gates", shrunk_in_turn),
    "taylor": Criterion(taylor, "weights"),
    "magnitude": Criterion(magnitude, "nothing"),
    "random": Criterion(random, "nothing"),
}
