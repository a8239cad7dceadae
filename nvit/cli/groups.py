"""What tyro parses and helps with: a command's flags in groups, as dataclasses that are made of its own fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import Field, field
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any, get_type_hints

import tyro

from .command import Command, flat, parts

Flat = tyro.conf.arg(name="")


@cache
def _fields(flags: type) -> dict[str, tuple[Any, type | None]]:
    """Annotation of every setting of a command by name, and the dataclass of a part that declares it first."""
    default = flags()
    inside = parts(default)
    found = {}
    for owner in (default, *inside.values()):
        hints = get_type_hints(type(owner), include_extras=True)
        homes = {f.name: None if owner is default else _first_with(type(owner), f) for f in dataclasses.fields(owner)}
        order = sorted(homes, key=lambda name: type(owner).__mro__.index(homes[name] or type(owner)))
        found |= {name: (hints[name], homes[name]) for name in order if owner is not default or name not in inside}
    return found


def _first_with(cls: type, f: Field) -> type:
    """The class in which a dataclass's field was first declared."""
    return next(c for c in reversed(cls.__mro__) if f.name in getattr(c, "__annotations__", {}))


def _title(home: type | None) -> str:
    name = "more" if home is None else home.__name__.removesuffix("Flags").removesuffix("Config").lower()
    return "loading" if name == "model" else name  # MODEL itself has that name


def view(command: Command) -> type:
    """A dataclass for tyro: MODEL as a positional argument, the first flags among the options, then a group of options
    for each part of the command, and for what a library's config has from the config it is derived from."""
    fields = _fields(command.flags)
    groups: dict[str, list[str]] = {"": [name for name in command.first if name in fields]}
    for name, (_, home) in fields.items():
        if name not in command.first and name not in ("model", "models"):
            groups.setdefault(_title(home), []).append(name)
    made = []
    if command.models:
        shown = tyro.conf.arg(metavar=command.shown)
        made.append((command.models, Annotated[tyro.conf.Positional[fields[command.models][0]], shown]))
    defaults = flat(command.flags())
    for title, names in groups.items():
        settings = [(name, fields[name][0], field(default=defaults[name])) for name in names]
        said = fields[names[0]][1].__doc__ if title and fields[names[0]][1] else " "
        group = _made(title or "first", settings, said.partition("\n")[0])
        made.append((title or "first", group if title else Annotated[group, Flat], field(default_factory=group)))
    return _made("View", made, command.flags.__doc__)


def _made(name: str, fields: list[tuple], doc: str) -> type:
    return dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True, namespace={"__doc__": doc})


def filled(made: type, command: Command, settings: Mapping[str, Any]) -> Any:
    """A view with these settings, the model required where there is none."""
    values = {}
    for f in dataclasses.fields(made):
        if f.name == command.models:
            values[f.name] = settings[f.name] or (tyro.MISSING if command.needy else settings[f.name])
        else:
            group = f.default_factory
            values[f.name] = group(**{g.name: settings[g.name] for g in dataclasses.fields(group)})
    return made(**values)


def settings_of(found: Any) -> dict[str, Any]:
    """Every setting in a view, or in the one inside its subcommand, by its flag's name."""
    plain = {}
    for f in dataclasses.fields(found):
        value = getattr(found, f.name)
        plain |= settings_of(value) if dataclasses.is_dataclass(value) else {f.name: value}
    return plain


HOW = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)


def union(commands: Mapping[str, Command], defaults: Mapping[str, Any]) -> Any:
    """Commands as subcommands, those of two words inside one of the first; a command without a default is its name and
    its words alone, as making a parser of all flags of all commands takes its time."""
    made: dict[str, list[Any]] = {}
    for name, command in commands.items():
        first, _, second = name.partition(" ")
        if name in defaults:
            kind = view(command)
            how = tyro.conf.subcommand(second or first, default=filled(kind, command, flat(defaults[name])))
        else:
            kind, how = _made("View", [], command.flags.__doc__), tyro.conf.subcommand(second or first)
        made.setdefault(first, []).append(Annotated[kind, how])
    outer = []
    for name, kinds in made.items():
        inner = [Annotated[_made(name, [("of", reduce(or_, kinds))], " "), tyro.conf.subcommand(name)]]
        outer += kinds if name in commands else inner
    return reduce(or_, outer)
