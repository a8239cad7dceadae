"""What people change in a model once it is made, and a spec can say beside the constructor's arguments: numbers of its
layers (an attention's scale, a norm's epsilon, dropout), and which parameterless layer stands at a place.

A model is compared with the one that its spec builds, module by module. What differs and is not of these kinds cannot
be said, and is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.layers import DropPath
from torch import nn

from .base import host_class
from .timm_config import ACTIVATIONS

NUMBERS = ("approximate", "attn_drop", "drop_prob", "eps", "negative_slope", "p", "scale", "scale_by_keep")
"""Attributes of layers that a spec can say."""

LAYERS: dict[str, Callable[[], nn.Module]] = ACTIVATIONS | {
    "identity": nn.Identity,
    "dropout": nn.Dropout,
    "drop_path": DropPath,
    "elu": nn.ELU,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "relu6": nn.ReLU6,
    "tanh": nn.Tanh,
}
"""Parameterless layers by the names that a spec has for them."""

KIND = "layer"
"""The key under which a change names the layer that stands at its place."""

_NO_MATTER = {
    "training",  # saving leaves it alone
    "grad_checkpointing", "gradient_checkpointing", "fused_attn",  # how it is computed
    "mlp_ratio", "target_shift_size",  # read while a model is made, and no more
}  # fmt: skip
"""Attributes that change nothing of what a model computes."""

Changes = dict[str, dict[str, Any]]
"""Module name -> its numbers by attribute, and under `KIND` the layer it is, where another was built."""


def changes_of(model: nn.Module, built: nn.Module) -> Changes:
    """What has to be changed in `built` so that it is `model`.

    Args:
        model, built: prepared, of the same widths; `built` may be on the meta device.

    Raises:
        ValueError: they differ in something that a spec cannot say; one line that names the first such place.

    >>> plain, model = nvit.load(nvit.BUNDLED), nvit.load(nvit.BUNDLED)
    >>> model.norm.eps = 1e-3
    >>> nvit.adapters.changes_of(model, plain)
    {'norm': {'eps': 0.001}}
    """
    mine, theirs = (dict(m.named_modules()) for m in (model, built))
    _same_parameters(model, built, mine, theirs)
    found: Changes = {}
    for name, module in mine.items():
        if name not in theirs:
            raise _cannot_say(name, _title(module), "nothing")
        change, other = {}, theirs[name]
        if not _alike(module, other):
            kind = next((kind for kind, cls in LAYERS.items() if type(module) is cls), None)
            if kind is None or next(other.parameters(), None) is not None:
                raise _cannot_say(name, _title(module), _title(other))
            change[KIND], other = kind, LAYERS[kind]()
        change |= _numbers(name, module, other)
        if change:
            found[name] = change
    if gone := next((name for name in theirs if name not in mine), None):
        raise _cannot_say(gone, "nothing", _title(theirs[gone]))
    return found


def change_(built: nn.Module, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Make these changes in place.

    Raises:
        ValueError: a place, layer or number that the model does not have.

    >>> model = nvit.load(nvit.BUNDLED)
    >>> nvit.adapters.change_(model, {"norm": {"eps": 1e-3}})
    >>> model.norm.eps
    0.001
    """
    modules = dict(built.named_modules())
    for name, change in changes.items():
        module = modules.get(name)
        if module is None or not name:
            raise ValueError(f"changes: the model has no layer {name!r}")
        if KIND in change:
            kind = change[KIND]
            if kind not in LAYERS or next(module.parameters(), None) is not None:
                raise ValueError(f"changes: {name} cannot become {kind!r}; known are {', '.join(LAYERS)}")
            owner, _, leaf = name.rpartition(".")
            module = LAYERS[kind]().train(module.training)
            setattr(modules[owner], leaf, module)
        for key, value in change.items():
            if key == KIND:
                continue
            if key not in NUMBERS or not hasattr(module, key) or not isinstance(value, (int, float, str)):
                raise ValueError(f"changes: {name} has no number {key!r} to set to {value!r}")
            setattr(module, key, value)


def _same_parameters(
    model: nn.Module, built: nn.Module, mine: Mapping[str, nn.Module], theirs: Mapping[str, nn.Module]
) -> None:
    """Raise ValueError where names or shapes of what a state dict holds differ; says which layer is another."""
    found, expected = ({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (model, built))
    for name in (*found, *expected):
        if found.get(name) != expected.get(name):
            place = name.rpartition(".")[0]
            while place and place not in theirs and place not in mine:
                place = place.rpartition(".")[0]
            outer = next((p for p in _outwards(place) if p in mine and p in theirs), "")
            if outer and not _alike(mine[outer], theirs[outer]):
                raise _cannot_say(outer, _title(mine[outer]), _title(theirs[outer]))
            raise _cannot_say(name, found.get(name, "nothing"), expected.get(name, "nothing"))


def _outwards(place: str) -> list[str]:
    """A module's name and those of the modules it is in, the outermost first."""
    parts = place.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _alike(module: nn.Module, built: nn.Module) -> bool:
    """Whether two modules are of one class; a plain linear layer may stand for a prunable one, as a new head does."""
    return host_class(module) is host_class(built) or (type(module) is nn.Linear and isinstance(built, nn.Linear))


def _numbers(name: str, module: nn.Module, built: nn.Module) -> dict[str, Any]:
    """The plain attributes in which a layer differs from the one that was built for it. Names (strings) and what the
    model itself carries are left out: what they do to its outputs, outputs show."""
    change: dict[str, Any] = {}
    if not name:
        return change
    for key, value in vars(module).items():
        if key.startswith("_") or key in _NO_MATTER or not _is_plain(value) or key not in vars(built):
            continue
        expected = vars(built)[key]
        if not _is_plain(expected) or value == expected or (isinstance(value, tuple) and list(value) == expected):
            continue
        if key in NUMBERS and value is not None:
            change[key] = value
        elif not isinstance(value, str):
            raise _cannot_say(f"{name}.{key}", value, expected)
    return change


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _title(module: nn.Module) -> str:
    inside = [type(m).__name__ for m in module.children()]
    return type(module).__name__ + (f" of {', '.join(inside[:4])}" if isinstance(module, nn.Sequential) else "")


def _cannot_say(where: str, found: Any, expected: Any) -> ValueError:
    return ValueError(
        f"{where or 'the model'}: found {found}, but what a snapshot rebuilds has {expected} there. A snapshot cannot "
        "say this change: undo it before saving, or save the state dict with your own code"
    )
