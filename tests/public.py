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
        listed = getattr(thing, "__all__", None) or [n for n in vars(thing) if not n.startswith("_")]
        for n in listed:
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
