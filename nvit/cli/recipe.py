"""Recipes: a command's dataclass from a TOML file, whose keys are its flags, and back."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from .. import __version__
from ..utils.files import write_atomically
from ..utils.settings import check_choices, nearest
from .command import Command, flat, parts, with_settings

NOT_OF_A_RECIPE = ("out", "resume", "debug", "dump_config")
"""Where a run is kept and what is shown of it are not what it does."""


def from_toml(cls: type, path: str | Path) -> Any:
    """A command's dataclass from a recipe.

    Raises:
        ValueError: no such file, not TOML, an unknown key or choice (names the nearest), or a value of a wrong type.
    """
    return from_dict(cls, read_toml(path), str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """A recipe's keys, as flags have them with underscores, and values.

    Raises:
        ValueError: no such file, or not TOML.
    """
    try:
        raw = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"recipe {path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as e:
        raise ValueError(f"recipe {path} is not valid TOML: {e}") from None
    return {key.replace("-", "_"): value for key, value in raw.items()}


def from_dict(cls: type, raw: Mapping[str, Any], source: str) -> Any:
    """`from_toml` of what was read already; `source` names it in messages."""
    command = cls()
    defaults, values = flat(command), {}
    for key, value in raw.items():
        if key not in defaults:
            raise ValueError(f"{source}: unknown key {key!r}{nearest(key, defaults)}")
        values[key] = _typed(source, key, value, defaults[key])
    command = with_settings(command, values)
    try:
        for part in (command, *parts(command).values()):
            check_choices(part)
    except ValueError as e:
        raise ValueError(f"{source}: {e}") from None
    return command


def dump(settings: Any, command: Command, name: str) -> None:
    """Write every setting to the recipe that it names, which does the same again."""
    path = settings.general.dump_config
    of = "prune" if command.demo is not None else name
    found = {key: value for key, value in flat(settings).items() if key not in NOT_OF_A_RECIPE}
    lines = [f"# nvit {of} {path}        nvit {__version__}", *(f"{key} = {_toml(v)}" for key, v in found.items())]
    write_atomically(Path(path), ("\n".join(lines) + "\n").encode())


def _toml(value: Any) -> str:
    """A value as TOML writes it, as JSON does: strings, numbers, true and false, lists."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _typed(source: str, key: str, value: Any, default: Any) -> Any:
    """`value` as the type of the field's default; TOML knows no tuples, and writes whole floats as integers."""
    if isinstance(default, tuple):
        value = tuple(value) if isinstance(value, list) else (value,)
        value = tuple(_typed(source, key, v, default[0]) for v in value) if default else value
    elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(f"{source}: {key} is {value!r}, expected {type(default).__name__} as {default!r}")
    return value
