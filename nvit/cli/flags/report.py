"""Flags of `nvit report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ...config import _help
from ..command import Command
from .parts import GeneralFlags

TAKES = "folders of runs, comparisons, finetunings or snapshots"


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """One HTML page of what runs cost and gave, to open, send or print."""

    models: Annotated[tuple[str, ...], _help(TAKES)] = ()
    out: Annotated[str, _help("the page; report.html in the first folder if empty")] = ""
    general: GeneralFlags = field(default_factory=GeneralFlags)


COMMAND = Command(ReportCommand, "report", first=("out",), takes=TAKES, word="RUN")
