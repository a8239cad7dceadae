"""The loss of a rank, and the wish of a person or the launcher that a run ends."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    """Whether rank 0 is asked to end: by a person (Ctrl-C), or by the launcher (SIGTERM) when another rank is gone.

    A signal inside is only noted, so that the step is finished and the run state can still be written: a launcher gives
    half a minute for that. A second Ctrl-C ends at once, and nothing is written.
    """

    def __init__(self) -> None:
        self.asked: BaseException | None = None

    def __enter__(self) -> Ending:
        self.before: dict[int, Any] = {}
        if main():
            with suppress(ValueError):  # not in the main thread: signals keep their defaults
                self.before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupted)
                if world() > 1:
                    self.before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._ended)
        return self

    def _interrupted(self, *_: Any) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = KeyboardInterrupt()

    def _ended(self, *_: Any) -> None:
        if self.asked is None:
            self.asked = RankLost("the launcher ends the run (SIGTERM); the same command with --resume goes on")

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise what was asked for: KeyboardInterrupt or RankLost."""
        if self.asked is not None:
            raise self.asked
