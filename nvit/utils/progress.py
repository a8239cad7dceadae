"""How long work tells of its progress: a callback, and what is drawn for a person who asks for it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .stages import Stage, Tracker

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, text)`; `total` 0 where it is not known."""

F = TypeVar("F", bound=Callable[..., Any])

QUIET = 10.0
"""Seconds between two lines about the same work."""


def silent(done: int, total: int, text: str) -> None:
    """Say nothing."""


@contextlib.contextmanager
def shown(stages: Sequence[Stage] = (), console: Console | None = None) -> Iterator[Progress]:
    """One bar for all stages on a terminal; elsewhere a line on stderr every ten seconds, also where the work says
    nothing, and when the work changes; of rank 0 alone."""
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    console = console or Console(stderr=True)
    if int(os.environ.get("RANK", 0)):  # as the launcher says: the processes may not have joined yet
        yield silent
        return
    tracker = Tracker(stages)
    if not console.is_terminal:
        lines = _Lines(tracker)
        with _every(1.0, lines.remind):
            yield lines
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold", ratio=2)),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[left]}"),
    )
    with Bar(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task("", total=1.0, left="")

        def draw() -> None:
            left = tracker.left_in_words() if stages else ""
            bar.update(task, completed=tracker.fraction, description=tracker.text, left=left)

        def progress(done: int, total: int, text: str) -> None:
            tracker(done, total, text)
            draw()

        with _every(0.5, draw):
            yield progress


def showing(function: F) -> F:
    """Let a function with a callback `progress` also take True, for what the commands show, or False for nothing."""

    @functools.wraps(function)
    def run(*args: Any, progress: Progress | bool = False, **more: Any) -> Any:
        if callable(progress):
            return function(*args, progress=progress, **more)
        with shown() if progress else contextlib.nullcontext(silent) as told:
            return function(*args, progress=told, **more)

    return run


@contextlib.contextmanager
def _every(seconds: float, work: Callable[[], None]) -> Iterator[None]:
    """Do something again and again on a thread of its own, as long as this lasts."""
    over = threading.Event()

    def again() -> None:
        while not over.wait(seconds):
            work()

    thread = threading.Thread(target=again, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Lines:
    """A line when the work changes, and one every ten seconds."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.work, self.at = tracker, "", time.monotonic()

    def __call__(self, done: int, total: int, text: str) -> None:
        self.tracker(done, total, text)
        work = text.partition(":")[0]
        if work != self.work or time.monotonic() - self.at > QUIET:
            self.work = work
            self._write()

    def remind(self) -> None:
        if time.monotonic() - self.at > QUIET:
            self._write()

    def _write(self) -> None:
        self.at = time.monotonic()
        print(self.tracker.in_words(), file=sys.stderr, flush=True)
