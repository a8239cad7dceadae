"""Tensors on disk, written so that a kill or a full disk leaves either the old file or the new one; and read with every
size checked against the file's own before anything is allocated."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .files import short, write_atomically

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that nvit writes, as safetensors names them."""

_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a safetensors file: bytes from `start` to `stop`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, atomically; a full disk is an OSError, as with any other file."""

    def write(file: Path) -> None:
        try:
            save_file(dict(tensors), file, metadata=metadata)
        except SafetensorError as e:
            raise OSError(f"{path} cannot be written: {e}") from None

    write_atomically(path, write)


def read_header(path: Path) -> dict[str, Entry]:
    """What a safetensors file says it holds, in the order in which it lies there; it is as long as that takes.

    Raises:
        ValueError: it is no safetensors file, or its sizes do not add up to the file's; in a few words.
    """
    try:
        with open(path, "rb") as f:
            size = f.seek(0, 2)
            f.seek(0)
            (length,) = struct.unpack("<Q", f.read(8))
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"its header of {length} bytes is longer than the file")
            raw = json.loads(f.read(length))
        raw.pop("__metadata__", None)
        found = {str(name): _entry(said, 8 + length) for name, said in raw.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as e:
        raise ValueError(short(e)) from None
    found = dict(sorted(found.items(), key=lambda item: item[1].start))
    end = 8 + length
    for name, entry in found.items():
        if entry.start != end or entry.stop - end != math.prod(entry.shape) * entry.dtype.itemsize:
            raise ValueError(short(f"{name} does not lie where its header says"))
        end = entry.stop
    if end != size:
        raise ValueError(f"{size} bytes are found, {end} expected")
    return found


def _entry(said: Mapping, data: int) -> Entry:
    shape, (start, stop) = tuple(said["shape"]), said["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError("a size in its header is no number")
    return Entry(DTYPES[said["dtype"]], shape, data + start, data + stop)


def raw_tensors(path: Path) -> Iterator[tuple[str, Entry, Tensor]]:
    """Name, entry and bytes (uint8) of every tensor of a file, one at a time, so that no more than one is held.

    Raises:
        ValueError: as `read_header`.
    """
    entries = read_header(path)
    with open(path, "rb") as f:
        for name, entry in entries.items():
            f.seek(entry.start)
            buffer = bytearray(f.read(entry.stop - entry.start))
            yield (
                name,
                entry,
                torch.frombuffer(buffer, dtype=torch.uint8) if buffer else torch.empty(0, dtype=torch.uint8),
            )


def bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's bytes on the CPU, uint8 `(bytes,)`; a view where it lies there in one piece."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
