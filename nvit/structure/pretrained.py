"""Pruned models in folders that `save_pretrained` of their class of transformers wrote: `config.json` says the widths,
`model.safetensors` (or the parts that an index names) holds the weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..adapters import hf_folder
from ..utils.files import read_json, short
from .skeleton import filled, skeleton
from .verify import check_shapes, shapes_in

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def is_pruned(path: str | Path) -> bool:
    """Whether a folder holds a pruned model as `nvit.hf.save_pretrained` writes it, or says so."""
    return hf_folder.pruned_spec(path) is not None


def load(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """The pruned model of such a folder, in eval mode, of the class of transformers that was pruned.

    Raises:
        ValueError: a file is missing, damaged, or does not fit the others; one line that names it.
    """
    path = Path(path)
    spec = hf_folder.pruned_spec(path)
    if spec is None:
        raise ValueError(f"{path} holds no pruned model: its {hf_folder.CONFIG} says no widths")
    try:
        model = skeleton(spec)
    except ModuleNotFoundError:
        raise
    except Exception as e:  # what unchecked numbers make of a host's constructor
        raise ValueError(f"{path / hf_folder.CONFIG} is damaged or from another version: {short(e)}") from None
    files = _weights(path)
    shapes = {name: shape for file in files for name, shape in shapes_in(file).items()}
    check_shapes(path / WEIGHTS, shapes, model, hf_folder.CONFIG)
    try:
        state = {name: tensor for file in files for name, tensor in load_file(file, device=str(device)).items()}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path / WEIGHTS} is damaged: {short(e)}") from None
    model = filled(model, state)
    return model if dtype is None else model.to(dtype)


def _weights(path: Path) -> list[Path]:
    """The files that hold the weights."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    try:
        names = sorted(set(read_json(path / INDEX)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} has no {WEIGHTS}, nor an {INDEX} that can be read; save the model again") from None
    files = [path / Path(name).name for name in names]
    if gone := next((file for file in files if not file.is_file()), None):
        raise ValueError(f"{gone} is missing, which {INDEX} names; copy the folder again")
    return files
