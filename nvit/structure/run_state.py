"""The state of a run as one file, enough to go on from, and the sha256 of all that is in it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..utils.files import short
from ..utils.tensors import bytes_of, read_header, write_tensors


def save_run_state(path: str | Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write all that a run needs to go on, as one file that is either the old state or the new one.

    Args:
        tensors: by name.
        values: plain JSON values.

    >>> nvit.snapshot.save_run_state("state.safetensors", {"mask": torch.ones(2)}, {"step": 3})
    >>> nvit.snapshot.load_run_state("state.safetensors")[1]
    {'step': 3}
    """
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    said = json.dumps(values)
    write_tensors(Path(path), flat, {"values": said, "sha256": _digest(flat, said)})


def load_run_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_run_state` wrote. A state from before it was signed loads with a warning.

    Raises:
        ValueError: the file is missing, damaged, or another than it was when it was written.

    >>> nvit.snapshot.save_run_state("state.safetensors", {"mask": torch.ones(2)}, {"step": 3})
    >>> tensors, values = nvit.snapshot.load_run_state("state.safetensors")
    >>> tensors["mask"], values["step"]
    (tensor([1., 1.]), 3)
    """
    try:
        read_header(Path(path))
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            said, values = metadata["values"], json.loads(metadata["values"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as e:
        raise ValueError(f"{path} is not a run state ({short(e)}); start the run without --resume") from None
    if "sha256" not in metadata:
        warnings.warn(f"{path} is from before run states were signed: it is unchecked", stacklevel=2)
    elif metadata["sha256"] != _digest(tensors, said):
        raise ValueError(f"{path} is damaged: its sha256 is not its own; start the run without --resume")
    return tensors, values


def _digest(tensors: Mapping[str, Tensor], values: str) -> str:
    """Of names, dtypes, shapes and bytes, whatever the order."""
    found = hashlib.sha256(values.encode())
    for name, t in sorted(tensors.items()):
        found.update(f"\n{name} {t.dtype} {tuple(t.shape)}\n".encode())
        found.update(bytes_of(t).numpy())
    return found.hexdigest()
