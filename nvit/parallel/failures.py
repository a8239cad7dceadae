"""The loss of a rank, and the launcher's wish that rank 0 ends."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from .process import main, rank, world


class RankLost(ConnectionError):
    """Another rank is gone, so that no collective can be finished."""


_LOSS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "process group", "processgroup")


@contextmanager
def watch() -> Iterator[None]:
    """Failed collectives inside are `RankLost`."""
    try:
        yield
    except RuntimeError as e:
        text = str(e)
        if world() == 1 or not (isinstance(e, dist.DistError) or any(word in text.lower() for word in _LOSS)):
            raise
        cause = re.sub(r"^\[[^]]*\] *", "", text.splitlines()[0]).partition(". ")[0]
        raise RankLost(
            f"rank {rank()} lost another of {world()} ranks ({cause}); the same command with --resume goes on, with "
            "any number of ranks"
        ) from e


class Ending:
    """Whether the launcher has asked rank 0 to end (SIGTERM), which it does when another rank is gone.

    The signal is only noted, so that the run state can still be written: a launcher gives half a minute for that.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Ending:
        self.before = None
        if world() > 1 and main():
            try:
                self.before = signal.signal(signal.SIGTERM, self._note)
            except ValueError:  # not in the main thread: the signal keeps its default
                self.before = None
        return self

    def _note(self, *_: Any) -> None:
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def check(self) -> None:
        """Raise RankLost if the end was asked for."""
        if self.asked:
            raise RankLost("the launcher ends the run (SIGTERM); the same command with --resume goes on")
