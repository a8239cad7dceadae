"""Other modules in the places of a model's own, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def standing_in(model: nn.Module, stand_ins: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Whoever calls one of these modules inside `model` calls its stand-in meanwhile.

    The modules themselves are left alone, with whatever hooks and wrappers they carry, and a stand-in may call the one
    whose place it takes. Afterwards, also after an exception, every module is where it was.

    Args:
        stand_ins: by module of `model`, at whatever places it is there.
    """
    if not stand_ins:
        yield
        return
    places = [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)
        for name, module in model.named_modules(remove_duplicate=False)
        if name and module in stand_ins
    ]
    assert {module for _, _, module in places} == set(stand_ins), "a module to stand in for is not part of the model"
    try:
        for parent, name, module in places:
            setattr(parent, name, stand_ins[module])
        yield
    finally:
        for parent, name, module in places:
            setattr(parent, name, module)
