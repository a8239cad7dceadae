"""The shape of a command, and the flat view of its dataclass that recipes, flags and result.json have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.files import read_json
from ..utils.report import RESULT


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        flags: its dataclass, of plain fields and of parts; its methods are asked for where it has them: `check` raises
            ValueError where values make no sense, `states` lists the files that `--resume` goes on from. A field
            `model` (`models`) is a positional argument.
        work: the file of `nvit.cli` whose `run(flags)` does the work and prints the table; imported only then.
        first: names of the flags that come first in its help, 12 at most.
        ranks: whether several processes can run it together.
        demo: the recipe it always starts from, model included.
        apart: pairs of a switch and a flag that it stands in place of.
        takes: what its positional arguments are, where they are no models.
        needy: whether there has to be a model.
        word: what its help calls one.
    """

    flags: type
    work: str
    first: tuple[str, ...]
    ranks: bool = False
    demo: Path | None = None
    apart: tuple[tuple[str, str], ...] = ()
    takes: str = ""
    needy: bool = True
    word: str = "MODEL"

    @property
    def models(self) -> str:
        """The field that positional arguments fill: `model`, `models`, or none."""
        names = {f.name for f in dataclasses.fields(self.flags)} if self.demo is None else ()
        return next((name for name in ("model", "models") if name in names), "")

    @property
    def shown(self) -> str:
        """Its positional arguments in a line of help: `MODEL`, `MODEL …`, or none."""
        return {"model": self.word, "models": f"{self.word} …", "": ""}[self.models]


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


def with_settings(command: Any, values: Mapping[str, Any]) -> Any:
    """A command with these settings in place of its own, by the names that `flat` gives."""
    values = dict(values)
    for name, part in parts(command).items():
        theirs = {f.name: values.pop(f.name) for f in dataclasses.fields(part) if f.name in values}
        command = dataclasses.replace(command, **{name: dataclasses.replace(part, **theirs)})
    return dataclasses.replace(command, **values)


def resumable(command: Any) -> bool:
    """Whether an interrupted run left something to go on from, where the command can."""
    return any(file.exists() for file in getattr(command, "states", list)())


def no_model(name: str, takes: str = "") -> str:
    """What to say where a command needs a model, or what else it takes, and nothing names one."""
    if takes:
        return f"nvit {name} needs {takes}"
    return (
        f"MODEL is missing: nvit {name} MODEL … takes a timm name (vit_small_patch16_224), hf-hub:NAME, or the folder "
        "of a snapshot, a run or a Hugging Face model; nvit demo brings its own"
    )


def finished(command: Any) -> dict[str, Any] | None:
    """What a finished run in a command's folder found; None where there is none.

    Raises:
        ValueError: its `result.json` is damaged.
    """
    file = Path(command.out) / RESULT
    try:
        return read_json(file) if file.exists() and not resumable(command) else None
    except ValueError as e:
        raise ValueError(f"{file} cannot be read: {e}; remove it to run again") from None


def numbered(command: Any) -> Any:
    """A command whose `out` nobody gave: its first folder of that name and a number that holds nothing, so that no run
    writes over another; to resume, the last that holds something."""
    last, nth = command, 1
    while True:
        name = command.out if nth == 1 else f"{command.out}-{nth}"
        this = dataclasses.replace(command, out=name)
        if not _holds(Path(name)) and not resumable(this):
            return last if getattr(command, "resume", False) else this
        last, nth = this, nth + 1


def _holds(folder: Path) -> bool:
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
