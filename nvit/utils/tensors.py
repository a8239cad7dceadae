"""Tensors on disk, written so that a kill or a full disk leaves either the old file or the new one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .files import write_atomically


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, atomically; a full disk is an OSError, as with any other file."""

    def write(file: Path) -> None:
        try:
            save_file(dict(tensors), file, metadata=metadata)
        except SafetensorError as e:
            raise OSError(f"{path} cannot be written: {e}") from None

    write_atomically(path, write)
