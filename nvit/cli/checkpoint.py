"""Weights of a timm model from a file: known containers and prefixes taken off, and what does not fit named."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from timm.models import load_state_dict
from torch import Tensor, nn

from ..utils.files import short

CONTAINERS = ("state_dict", "model", "module", "model_state_dict")
"""Keys under which training code puts a state dict."""

PREFIXES = ("", "module.", "model.", "backbone.", "_orig_mod.")
"""What DistributedDataParallel, Lightning, mmpretrain and torch.compile put before names."""

_NAMED = 5


def load_weights_(model: nn.Module, file: str, name: str, resample) -> None:
    """Load a checkpoint into timm's model `name`, all of it and nothing else.

    Args:
        resample: timm's filter of its module, which brings position embeddings to another image size; or None.

    Raises:
        ValueError: no such file, not a state dict, or names and shapes that do not fit.
    """
    if not Path(file).is_file():
        raise ValueError(f"checkpoint {file} does not exist")
    try:
        state = load_state_dict(file, use_ema=False, weights_only=True)
    except Exception as e:  # unpickling and safetensors have exception classes of their own
        raise ValueError(f"checkpoint {file} cannot be read: {short(e)}") from None
    expected = model.state_dict()
    state = unwrapped(state, expected.keys())
    if not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"checkpoint {file} is no state dict; it holds {short(list(state))}")
    if resample is not None:
        state = resample(state, model)
    if said := misfit({n: tuple(t.shape) for n, t in state.items()}, {n: tuple(t.shape) for n, t in expected.items()}):
        raise ValueError(f"checkpoint {file} does not fit {name}: {said}")
    model.load_state_dict(state)


def unwrapped(state: Mapping[str, Any], expected: Collection[str]) -> dict[str, Any]:
    """A state dict out of its containers, without the prefixes that hide the most names that a model expects."""
    while inner := next((state[key] for key in CONTAINERS if isinstance(state.get(key), Mapping)), None):
        state = inner

    def without(pair: tuple[str, str]) -> dict[str, Any]:
        return {name.removeprefix(pair[0]).removeprefix(pair[1]): t for name, t in state.items()}

    return max((without(pair) for pair in product(PREFIXES, repeat=2)), key=lambda s: len(s.keys() & set(expected)))


def misfit(found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> str:
    """What is missing, unexpected and of another shape, the first few of each; empty where all fits."""
    kinds = {
        "missing": [n for n in expected if n not in found],
        "unexpected": [n for n in found if n not in expected],
        "of another shape": [
            f"{n} is {found[n]}, expected {expected[n]}" for n in expected if found.get(n, expected[n]) != expected[n]
        ],
    }
    said = [
        f"{len(names)} {kind} ({', '.join(names[:_NAMED])}{', …' * (len(names) > _NAMED)})"
        for kind, names in kinds.items()
        if names
    ]
    heads = [n for n in ("head.weight", "head.fc.weight") if found.get(n, ())[1:] == expected.get(n, (0,))[1:] != ()]
    if kinds["of another shape"] and heads and found[heads[0]] != expected[heads[0]]:
        said.append(f"it has {found[heads[0]][0]} classes: give --num-classes {found[heads[0]][0]}")
    return "; ".join(said)
