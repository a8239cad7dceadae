"""Memory: what a process or a GPU holds, the most it held since a moment, and the bytes that calls keep alive."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PROC = Path("/proc/self")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of mallopt(3)


def keep_freed_memory(keep: bool) -> None:
    """Whether glibc keeps what is freed, from here on; nothing happens where there is no glibc.

    By default it gives large blocks back to the system and faults them in again: a tenth of a whole model's time, but
    nothing for one of its parts, so that parts would not add up. Smaller blocks it keeps, and what it keeps between
    others serves few: half as much again as tensors hold. Without keeping, every block from 256 KiB on goes back at
    once. To keep, none may be mapped on its own: no threshold above 32 MiB is taken, and at 64 images a batch the
    hidden units of a dense ViT-Ti are larger than that, those of a model whose tokens merge are not.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1 if keep else 2**18)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25 if keep else 2**18)
        libc.mallopt(_M_MMAP_MAX, 0 if keep else 2**16)


class Meter:
    """Bytes held on a device now, and the most since `restart`: on CUDA allocated, on a CPU resident in this process.

    The peak is the device's own, so there is one meter a run, handed down: a second one would start it anew for both.

    Raises:
        ValueError: on a CPU, where the system does not say (no /proc).
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        if self.device.type != "cuda" and not (_PROC / "status").exists():
            raise ValueError("resident memory is read from /proc, which this system lacks; leave out --budget")
        self.restart()

    def trim(self) -> None:
        """Give freed memory back to the system, so that `held` says what is in use; the peak goes on."""
        gc.collect()
        if self.device.type != "cuda" and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)

    def restart(self) -> None:
        """`trim`, and let the peak start anew from what is held."""
        self.trim()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            (_PROC / "clear_refs").write_text("5")

    @property
    def held(self) -> int:
        """Bytes now."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else _status("VmRSS")

    @property
    def peak(self) -> int:
        """Bytes at most since `restart`."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")


def most_held(device: torch.device) -> int:
    """Bytes that this process has held at most since it began: on its GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int:
    lines = (_PROC / "status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive at once, by storage, from what every operation returns: workspace inside an
    operation is not seen. Views of tensors that were `there` before count for nothing.

    Attributes:
        live, peak: bytes now and at most.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in there}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._count(t.untyped_storage())
        return out

    def _count(self, storage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size
