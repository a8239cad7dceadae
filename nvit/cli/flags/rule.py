"""Flags of `nvit analyze rule`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ...config import _help
from ..command import Command
from .parts import NO_SNAPSHOT, SNAPSHOTS, GeneralFlags


@dataclass(frozen=True, kw_only=True)
class RuleCommand:
    """The ReViT-like rule of widths that fits pruned models (Sec. 5.4)."""

    models: Annotated[tuple[str, ...], _help(SNAPSHOTS)] = ()
    out: Annotated[str, _help("folder for rule.json, rule.csv, rule.png and result.json")] = "nvit-rule"
    target: Annotated[float, _help("of a run's folder, the snapshot at this target alone; 0 for all of them")] = 0.0
    general: GeneralFlags = field(default_factory=GeneralFlags)


COMMAND = Command(RuleCommand, "analyze_rule", first=("out", "target"), takes=NO_SNAPSHOT, word="SNAPSHOT")
