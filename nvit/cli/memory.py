"""When memory runs out: which flag to lower, or the command once more with half the batch."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import parallel
from .command import flat, with_settings
from .progress import say

_SAID = ("can't allocate memory", "not enough memory", "out of memory")
LATENCY = Path(__file__).parents[1] / "latency"


def in_memory(work: Callable[[Any], None], command: Any) -> None:
    """Do a command's work; with `--auto-batch`, again with half of its batch as long as memory runs out.

    Raises:
        ValueError: it runs out, and nothing is asked for or left to halve; says which flag to lower.
    """
    while (again := _tried(work, command)) is not None:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        say(f"nvit: memory ran out with --batch-size {flat(command)['batch_size']}; again with {again}")
        command = with_settings(command, {"batch_size": again})


def _tried(work: Callable[[Any], None], command: Any) -> int | None:
    """The batch to go on with where memory ran out; None where the work is done."""
    try:
        return work(command)
    except Exception as e:
        if not ran_out(e):
            raise
        settings = flat(command)
        flag = "latency_batch" if _timing(e) or "batch_size" not in settings else "batch_size"
        batch = settings.get(flag, 1)
        several = parallel.world() > 1 or getattr(command, "resume", False)
        if settings.get("auto_batch") and flag == "batch_size" and batch > 1 and not several:
            return batch // 2
        ways = [f"--{flag.replace('_', '-')} {max(1, batch // 2)} in place of {batch}"]
        if "auto_batch" in settings and flag == "batch_size" and batch > 1 and not settings["auto_batch"]:
            ways.append("--auto-batch, which halves it until it fits")
    raise ValueError(f"memory ran out; give {', or '.join(ways)}")


def ran_out(error: Exception) -> bool:
    """Whether an error is of an allocation that did not fit, on a GPU or on the host."""
    said = str(error).lower()
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(word in said for word in _SAID))


def _timing(error: Exception) -> bool:
    """Whether it happened while latency was measured, whose batch is another."""
    return any(Path(f.filename).is_relative_to(LATENCY) for f in traceback.extract_tb(error.__traceback__))
