"""Flags of `nvit analyze widths`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ...config import _help
from ..command import Command
from .parts import NO_SNAPSHOT, SNAPSHOTS, GeneralFlags


@dataclass(frozen=True, kw_only=True)
class WidthsCommand:
    """Widths of every block of snapshots: a CSV and a figure (the paper's Fig. 4)."""

    models: Annotated[tuple[str, ...], _help(SNAPSHOTS)] = ()
    out: Annotated[str, _help("folder for widths.csv, widths.png and result.json")] = "nvit-widths"
    target: Annotated[float, _help("of a run's folder, the snapshot at this target alone; 0 for all of them")] = 0.0
    general: GeneralFlags = field(default_factory=GeneralFlags)


COMMAND = Command(WidthsCommand, "analyze_widths", first=("out", "target"), takes=NO_SNAPSHOT, word="SNAPSHOT")
