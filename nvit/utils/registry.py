"""A list of classes by name, whose names are there without importing them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module


class Registry(Mapping[str, type]):
    """Classes imported when they are asked for, so that their names, which are flags' choices, come without torch.

    Args:
        package: that the files are in.
        homes: file and class of each, `file.Class`, by the class's own `name`.
    """

    def __init__(self, package: str, homes: Mapping[str, str]) -> None:
        self.package, self.homes = package, homes

    def __getitem__(self, name: str) -> type:
        file, _, cls = self.homes[name].partition(".")
        return getattr(import_module(f"{self.package}.{file}"), cls)

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)
