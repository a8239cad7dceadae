"""Recipes: a command's dataclass from a TOML file, whose keys are its flags."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ..config import _nearest, check_choices
from .command import flat, parts


def from_toml(cls: type, path: str | Path) -> Any:
    """A command's dataclass from a recipe.

    Raises:
        ValueError: no such file, not TOML, an unknown key or choice (names the nearest), or a value of a wrong type.
    """
    try:
        raw = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"recipe {path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as e:
        raise ValueError(f"recipe {path} is not valid TOML: {e}") from None
    return from_dict(cls, {key.replace("-", "_"): value for key, value in raw.items()}, str(path))


def from_dict(cls: type, raw: Mapping[str, Any], source: str) -> Any:
    """`from_toml` of what was read already; `source` names it in messages."""
    command = cls()
    defaults, values = flat(command), {}
    for key, value in raw.items():
        if key not in defaults:
            raise ValueError(f"{source}: unknown key {key!r}{_nearest(key, defaults)}")
        values[key] = _typed(source, key, value, defaults[key])
    for name, part in parts(command).items():
        theirs = {f.name: values.pop(f.name) for f in dataclasses.fields(part) if f.name in values}
        command = dataclasses.replace(command, **{name: dataclasses.replace(part, **theirs)})
    command = dataclasses.replace(command, **values)
    try:
        for part in (command, *parts(command).values()):
            check_choices(part)
    except ValueError as e:
        raise ValueError(f"{source}: {e}") from None
    return command


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
