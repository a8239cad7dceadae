"""Flags of `nvit analyze latency`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ...config import _help
from ...utils.settings import check_at_least_one
from ..command import Command
from .parts import MODEL, GeneralFlags, LatencyFlags, MachineFlags, ModelFlags


@dataclass(frozen=True, kw_only=True)
class PredictionCommand:
    """How far the latency table is off, over models of random widths."""

    model: Annotated[str, MODEL] = ""
    count: Annotated[int, _help("models of random widths")] = 24
    seconds: Annotated[float, _help("time for measuring them, all together")] = 60.0
    seed: Annotated[int, _help("of the widths")] = 0
    out: Annotated[str, _help("folder for latency.csv, latency.png and result.json")] = "nvit-latency-error"
    opening: ModelFlags = field(default_factory=ModelFlags)
    machine: MachineFlags = field(default_factory=MachineFlags)
    latency: LatencyFlags = field(default_factory=LatencyFlags)
    general: GeneralFlags = field(default_factory=GeneralFlags)

    def check(self) -> None:
        """Raise ValueError where a value makes no sense."""
        check_at_least_one(self, "count")
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}; it must be more than 0")
        if self.latency.table == "analytic":
            raise ValueError(
                "table is analytic, which counts and measures nothing; leave it out, or give a measured one"
            )


COMMAND = Command(PredictionCommand, "analyze_latency", first=("count", "seconds", "table", "out", "device"))
