"""A first look at a command line, before tyro's: which command, which recipe, which words are models, and what no flag
can take. Every refusal is one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from ..utils.settings import choices, nearest
from .command import Command, parts

HELP = ("-h", "--help")


class UsageError(Exception):
    """A command line is off."""


@dataclass(frozen=True)
class Line:
    """A command line.

    Attributes:
        name: of the command, as `analyze widths`.
        models: words that name models.
        flags: all else, in order, as tyro takes it.
        given: the names of flags that are there.
        recipe: a TOML file, or empty.
        asks: whether help is asked for.
    """

    name: str
    models: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()
    recipe: str = ""
    asks: bool = False


def read(args: Sequence[str], commands: Mapping[str, Command]) -> Line:
    """Tell the words of a command line apart.

    Raises:
        UsageError: an unknown command or flag, a value that its flag cannot have, more than one recipe, or a number of
            models that the command does not take.
    """
    name, rest = command_of(args, commands)
    command = commands[name]
    line = _sorted(name, command, rest)
    if line.asks:
        return line
    if len(line.models) > 1 and command.models != "models":
        raise UsageError(f"nvit {name} takes one MODEL, found {' '.join(line.models)}; flags begin with --")
    if line.models and not command.models:
        raise UsageError(f"nvit {name} takes no MODEL, found {' '.join(line.models)}; it has its own")
    if line.recipe and command.demo is not None:
        raise UsageError(f"nvit {name} is a recipe of its own; for {line.recipe} take nvit prune")
    return line


def command_of(args: Sequence[str], commands: Mapping[str, Command]) -> tuple[str, list[str]]:
    """The command's name, of one word or two, and what follows it."""
    name, rest = args[0], list(args[1:])
    families = {known.partition(" ")[0] for known in commands if " " in known}
    if name in families:
        inside = [known.partition(" ")[2] for known in commands if known.startswith(f"{name} ")]
        if not rest or rest[0] not in inside:
            near = nearest(rest[0], inside) if rest else ""
            raise UsageError(f"usage: nvit {name} {{{','.join(inside)}}} MODEL …{near}")
        name = f"{name} {rest.pop(0)}"
    if name not in commands:
        known = sorted({known.partition(" ")[0] for known in commands}, key=[*commands, *families].index)
        raise UsageError(f"unknown command {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return name, rest


def check_apart(line: Line, command: Command, recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise UsageError where a switch is on and what it stands in place of is said as well: by a flag, or by the recipe
    that turns it on."""
    for switch, other in command.apart:
        twice = recipe.get(switch) and other in recipe and tuple(recipe[other]) != settings[other]
        if settings[switch] and (other in line.given or twice):
            one, two = (f"--{name.replace('_', '-')}" for name in (switch, other))
            raise UsageError(f"{one} stands in place of {two}; give one of them")


def _sorted(name: str, command: Command, rest: list[str]) -> Line:
    hints, asks, taken = hints_of(command.flags), bool(set(HELP) & set(rest)), None
    models: list[str] = []
    recipes: list[str] = []
    flags: list[str] = []
    given: set[str] = set()
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            (recipes if word.endswith(".toml") else models).append(word)
            continue
        flag, equals, value = word.partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if word in HELP:
            flags.append(word)
        elif key == "model" and command.models == "model":
            models.append(value if equals else _value(flag, rest))
        elif (bare := key.removeprefix("no_")) in hints and hints[bare] is bool:
            if equals:
                raise UsageError(f"{flag} takes no value; leave out {equals}{value}")
            given.add(bare)
            flags.append(word)
        elif key not in hints or key in ("model", "models"):
            known = [f"--{k.replace('_', '-')}" for k, hint in hints.items()]
            raise UsageError(f"{name} has no flag {flag}{nearest(flag, known)}; --help lists them")
        elif get_origin(hints[key]) is tuple:
            found = [value] if equals else _values(rest)
            for v in found:
                _check(flag, v, hints[key], models)
            if found and not equals and not choices(hints[key]) and get_args(hints[key])[0] is str:
                taken = f"{found[-1]!r} is a value of {flag}"  # which may be any word, a MODEL among them
            given.add(key)
            flags += [flag, *found]
        else:
            value = value if equals else _value(flag, rest)
            _check(flag, value, hints[key], models)
            given.add(key)
            flags += [f"{flag}={value}"] if equals or value.startswith("-") else [flag, value]
    if len(recipes) > 1:
        raise UsageError(f"one recipe at most, found {', '.join(recipes)}")
    if taken and not models and not recipes and command.models:
        raise UsageError(f"{taken}; if it is the MODEL, write it before the flags")
    return Line(name, tuple(models), tuple(flags), frozenset(given), recipes[0] if recipes else "", asks)


def _value(flag: str, rest: list[str]) -> str:
    if not rest or rest[0].startswith("--"):
        raise UsageError(f"{flag} needs a value")
    return rest.pop(0)


def _values(rest: list[str]) -> list[str]:
    """Words up to the next flag."""
    end = next((i for i, word in enumerate(rest) if word.startswith("-") and not _is(float, word)), len(rest))
    found, rest[:] = rest[:end], rest[end:]
    return found


def _check(flag: str, word: str, hint: Any, models: Sequence[str]) -> None:
    """Raise UsageError where a flag cannot have this value."""
    several, known = get_origin(hint) is tuple, choices(hint)
    number = next((t for t in (int, float) if hint is t or (several and get_args(hint)[0] is t)), None)
    if known and word not in known:
        says = f"{flag}: unknown value {word!r}{nearest(word, known)}; expected one of {', '.join(map(str, known))}"
    elif number is not None and not _is(number, word):
        says = f"{flag}: {word!r} is not {'a whole' if number is int else 'a'} number"
    elif several and word.endswith(".toml"):
        says = f"{flag}: {word!r} would be one of its values"
    else:
        return
    if several and not models:
        says += "; a MODEL or recipe stands before the flags, or after a flag of one value"
    raise UsageError(says)


def _is(number: type, word: str) -> bool:
    try:
        number(word)
    except ValueError:
        return False
    return True


def hints_of(flags: type) -> dict[str, Any]:
    """The type of every flag of a command's dataclass, by name, as `flat` lists them."""
    default = flags()
    inside = parts(default)
    found = {}
    for owner in (default, *inside.values()):
        hints = get_type_hints(type(owner))
        found |= {
            f.name: hints[f.name] for f in dataclasses.fields(owner) if owner is not default or f.name not in inside
        }
    return found
