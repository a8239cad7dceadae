"""What a command does one after the other, so that all of it is one bar: how far it is, and how long it will take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOST_GUESSED = 0.95
"""A stage that says nothing comes no further than this by its time alone."""


@dataclass(frozen=True)
class Stage:
    """A part of a command's work.

    Attributes:
        work: how its texts begin, as `evaluate` of `evaluate: top-1 81.2 %`.
        share: of the whole, in any unit that all stages have in common.
        seconds: how long it takes where it says nothing in between; 0 where it tells of its steps.
    """

    work: str
    share: float
    seconds: float = 0.0


class Tracker:
    """How far a command is. Stages are met in their order; one that never begins counts as done when a later one does.
    What comes before the first of them, as the opening of a model, tells nothing of how long the rest will take.

    Args:
        stages: those expected; where there are none, or work has another name, only that work's own steps count.
        clock: seconds.
    """

    def __init__(self, stages: Sequence[Stage] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self.stages, self.clock = tuple(stages), clock
        self.began = self.since = clock()
        self.at, self.done, self.total, self.text = -1, 0, 0, "starting"
        self.first = 0.0  # part of the whole where the clock began

    def __call__(self, done: int, total: int, text: str) -> None:
        """As `utils.progress.Progress`."""
        self.text = text
        here, opened = self._stage_of(done, total, text), self.at < 0
        if here is not None and here != self.at:
            self.at, self.since = here, self.clock()
        if here is not None or not self.stages:
            self.done, self.total = done, total
        if here is not None and opened:
            self.began, self.first = self.clock(), self.fraction

    def _stage_of(self, done: int, total: int, text: str) -> int | None:
        again = self.at >= 0 and text.startswith(self.stages[self.at].work)
        anew = again and self.total and (self.done >= self.total or done * self.total < self.done * total)
        later = (i for i in range(self.at + 1, len(self.stages)) if text.startswith(self.stages[i].work))
        return next(later, self.at if again else None) if anew or not again else self.at

    @property
    def fraction(self) -> float:
        """Of the whole, in [0, 1]."""
        inside = self.done / self.total if self.total else 0.0
        if not self.stages or self.at < 0:
            return 0.0 if self.stages else inside
        stage = self.stages[self.at]
        if stage.seconds:
            inside = max(inside, MOST_GUESSED * (1 - math.exp(-(self.clock() - self.since) / stage.seconds)))
        shares = [s.share for s in self.stages]
        return (sum(shares[: self.at]) + inside * shares[self.at]) / sum(shares)

    @property
    def left(self) -> float | None:
        """Seconds to the end as it goes; None where too little is done to tell."""
        part = self.fraction
        passed = part - self.first
        if part == 1:
            return 0.0
        return None if passed < 0.01 else (self.clock() - self.began) * (1 - part) / passed

    def in_words(self) -> str:
        """The last text, its steps, the part of the whole and the time left."""
        steps = f" ({self.done}/{self.total})" if self.total > 1 else ""
        whole = f"; {self.fraction:.0%} of all, {self.left_in_words()}" if self.stages else ""
        return f"{self.text}{steps}{whole}"

    def left_in_words(self) -> str:
        if self.left is None:
            return "time unknown"
        minutes, seconds = divmod(round(self.left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"
