"""The processes of a loader."""

from __future__ import annotations

import signal
from typing import Any


def processes(count: int) -> dict[str, Any]:
    """A loader's arguments for so many processes, which leave Ctrl-C to the one that started them: it ends its step and
    saves it."""
    return {"num_workers": count, "worker_init_fn": _deaf if count else None}


def _deaf(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
