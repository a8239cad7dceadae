"""The names that users import: what `nvit` and its doors list, and the methods of classes among them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import nvit


def names() -> Iterator[tuple[str, object]]:
    """Every public class and function of ours by its dotted name, once."""
    seen: set[int] = set()
    for name in nvit.__all__:
        yield from _inside(f"nvit.{name}", getattr(nvit, name), seen)


def _inside(name: str, thing: object, seen: set[int]) -> Iterator[tuple[str, object]]:
    if inspect.ismodule(thing):
        own = [n for n, t in vars(thing).items() if getattr(t, "__module__", "") == thing.__name__ and n[0] != "_"]
        for n in dict.fromkeys([*getattr(thing, "__all__", []), *own]):
            yield from _inside(f"{name}.{n}", getattr(thing, n), seen)
    elif _ours(thing) and id(thing) not in seen:
        seen.add(id(thing))
        yield name, thing


def _ours(thing: object) -> bool:
    return (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__.startswith("nvit")


def functions() -> Iterator[tuple[str, object]]:
    """Public functions, and methods and properties that public classes define themselves."""
    for name, thing in names():
        if inspect.isfunction(thing):
            yield name, thing
            continue
        for n, member in vars(thing).items():
            member = getattr(member, "__func__", getattr(member, "fget", member))
            if inspect.isfunction(member) and (not n.startswith("_") or n in ("__init__", "__call__")):
                yield f"{name}.{n}", member
