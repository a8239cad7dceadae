"""Values of settings: the few that one may have, the least, and the known name that is most like an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints


def nearest(name: str, known: Iterable[str]) -> str:
    """For the end of a message about a name that nobody knows: the known one that is most like it, if any is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def choices(hint: Any) -> tuple[Any, ...]:
    """The values that an annotation made of literals allows; empty where any will do."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    inside = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
    return tuple(value for part in inside for value in choices(part))


def check_choices(config: Any) -> None:
    """Raise ValueError where a field of a command's dataclass is none of the few values it may have."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        found, known = getattr(config, name), choices(hint)
        for value in found if isinstance(found, tuple) else (found,):
            if known and value not in known:
                near = nearest(str(value), known)
                raise ValueError(f"{name}: unknown value {value!r}{near}; expected one of {', '.join(known)}")


def check_at_least_one(config: Any, *names: str) -> None:
    """Raise ValueError where one of these fields is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
