"""Flags of `nvit latency`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ...config import _help
from ..command import Command, no_model
from .parts import MODEL, GeneralFlags, LatencyFlags, MachineFlags, ModelFlags


@dataclass(frozen=True, kw_only=True)
class LatencyCommand:
    """Measure a latency table, or show one."""

    model: Annotated[str, MODEL] = ""
    out: Annotated[str, _help("folder for latency_table.json and result.json; none if empty")] = ""
    opening: ModelFlags = field(default_factory=ModelFlags)
    machine: MachineFlags = field(default_factory=MachineFlags)
    latency: LatencyFlags = field(default_factory=LatencyFlags)
    general: GeneralFlags = field(default_factory=GeneralFlags)

    @property
    def shows(self) -> bool:
        """Whether a table that was measured before is shown."""
        return self.latency.table not in ("", "analytic")

    def check(self) -> None:
        """Raise ValueError where there is neither a model to measure nor a table to show."""
        if not self.model and not self.shows:
            raise ValueError(f"{no_model('latency')}; or give a measured table to show: --table FILE")


COMMAND = Command(
    LatencyCommand,
    "latency",
    first=("table", "latency_batch", "latency_seconds", "out", "device", "target"),
    needy=False,
)
