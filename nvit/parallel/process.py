"""Who we are: the processes that torchrun started, their ranks and devices."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from ..utils.launch import launched

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others: longer than rank 0 measures or evaluates, so that only a hang exceeds it."""


LAST_WAIT = timedelta(hours=24)
"""How long the others wait at the end for rank 0, which alone evaluates and writes."""


_store: dist.Store | None = None


def join() -> None:
    """Join the processes that torchrun started, if it did: gloo on the CPU, nccl on CUDA. Again, it does nothing."""
    global _store
    if dist.is_initialized() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return
    _store, mine, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=_store, rank=mine, world_size=count, timeout=TIMEOUT)


def leave() -> None:
    """Wait for rank 0, which may still be evaluating, and part."""
    if not dist.is_initialized() or _store is None:
        return
    with suppress(RuntimeError):  # whoever is gone already has ended as well
        if main():
            _store.set("nvit/end", "1")
        else:
            _store.wait(["nvit/end"], LAST_WAIT)
        dist.all_reduce(torch.zeros(1))  # rank 0 may be keeping the store that the others have just read
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many ranks there are; 1 in a single process."""
    return dist.get_world_size() if dist.is_initialized() else 1


def main() -> bool:
    """Whether this process is the one that prints, writes, measures and evaluates."""
    return rank() == 0


def speaks() -> bool:
    """Whether this rank is the first to have something to say about the end of the run: the others keep silent."""
    if _store is None:
        return launched()[0] == 0
    try:
        return _store.add("nvit/said", 1) == 1
    except RuntimeError:  # the launcher took the store with it
        return main()


def own_device(device: torch.device) -> torch.device:
    """This rank's GPU where `device` is `cuda`; other devices are as they are.

    Raises:
        ValueError: more ranks on this machine than GPUs, or one GPU named for all ranks.
    """
    local, several = int(os.environ.get("LOCAL_RANK", 0)), launched()[1] > 1
    if device.type != "cuda" or not several:
        return device
    if device.index is not None:
        raise ValueError(f"device {device} is one GPU for {launched()[1]} ranks; give --device cuda for one each")
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"rank {local} of this machine has no GPU, there are {torch.cuda.device_count()}; start fewer processes"
        )
    return torch.device("cuda", local)
