"""Every export format by name, and what is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec

from .base import Format

_HOMES = {
    "torch": "torch_program.TorchProgram",
    "onnx": "onnx_file.OnnxFile",
    "openvino": "openvino_ir.OpenVinoIR",
    "aoti": "aoti.AotInductor",
}
"""File and class of each format, by the class's own `name`."""

REFUSED = {
    "fx": "torch.fx traces symbolic values through Python and stops at the first branch on one; a graph that does "
    "not is what torch.export writes: --format torch",
    "script": "TorchScript is deprecated by torch, which no longer mends it; --format torch loads without this package "
    "as well, --format aoti in C++",
}
"""Formats that people ask for, and why they are not here."""


class _Registry(Mapping[str, Format]):
    """Formats made when they are asked for, so that their names, which are flags' choices, come without torch."""

    def __getitem__(self, name: str) -> Format:
        file, _, cls = _HOMES[name].partition(".")
        return getattr(import_module(f"{__package__}.{file}"), cls)()

    def __iter__(self) -> Iterator[str]:
        return iter(_HOMES)

    def __len__(self) -> int:
        return len(_HOMES)


FORMATS: Mapping[str, Format] = _Registry()


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError where a format is unknown, refused, or named twice."""
    if not names:
        raise ValueError(f"no format is named; expected some of {', '.join(FORMATS)}")
    for name in names:
        if name in REFUSED:
            raise ValueError(f"format {name} is refused: {REFUSED[name]}")
        if name not in FORMATS:
            raise ValueError(f"format {name!r} is unknown; expected one of {', '.join(FORMATS)}")
        if names.count(name) > 1:
            raise ValueError(f"format {name} is named twice")


def formats(names: Sequence[str]) -> list[Format]:
    """The formats of these names, whose packages are there.

    Raises:
        ValueError: one is unknown, refused by name, or needs a package or a compiler that is not there.
    """
    check_names(names)
    found = [FORMATS[name] for name in names]
    for form in found:
        missing = [package for package in form.packages if find_spec(package) is None]
        if missing:
            raise ValueError(f"format {form.name} needs {', '.join(missing)}; pip install 'nvit[{form.extra}]'")
        if (reason := form.refusal()) is not None:
            raise ValueError(f"format {form.name}: {reason}")
    return found
