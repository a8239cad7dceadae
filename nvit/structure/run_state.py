"""The state of a run as one file, enough to go on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..utils.tensors import write_tensors


def save_run_state(path: str | Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write all that a run needs to go on, as one file that is either the old state or the new one.

    Args:
        tensors: by name.
        values: plain JSON values.
    """
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_tensors(Path(path), flat, {"values": json.dumps(values)})


def load_run_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_run_state` wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as f:
            values = json.loads((f.metadata() or {})["values"])
            return {name: f.get_tensor(name) for name in f.keys()}, values  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as e:
        raise ValueError(f"{path} is not a run state ({e}); start the run without --resume") from None
