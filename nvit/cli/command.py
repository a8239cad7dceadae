"""The shape of a command line, and the flat view of a command's dataclass that recipes and result.json have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        flags: its dataclass; a method `check` of it, if there is one, raises ValueError where values make no sense.
        words: the words before the flags, for people.
        run: called with the flags and the words that are no recipe; does the work and prints the table.
        least, most: how many such words; any number when None.
        ranks: whether several processes can run it together.
        demo: the recipe that stands in where neither a recipe nor `--model` is given.
    """

    flags: type
    words: str
    run: Callable[[Any, Sequence[str]], None]
    least: int = 0
    most: int | None = 0
    ranks: bool = False
    demo: Path | None = None


def parts(command: Any) -> dict[str, Any]:
    """The parts of a command's dataclass by name: fields that are dataclasses themselves."""
    found = {f.name: getattr(command, f.name) for f in dataclasses.fields(command)}
    return {name: value for name, value in found.items() if dataclasses.is_dataclass(value)}


def flat(command: Any) -> dict[str, Any]:
    """Every setting of a command by its flag's name: its own first, then those of its parts in order."""
    inside = parts(command)
    own = {f.name: getattr(command, f.name) for f in dataclasses.fields(command) if f.name not in inside}
    for part in inside.values():
        own |= dataclasses.asdict(part)
    return own


def resumable(command: Any) -> bool:
    """Whether an interrupted run left something to go on from, where the command can."""
    return any(file.exists() for file in getattr(command, "states", list)())
