"""How long work tells of its progress: a callback, and what is drawn for a person who asks for it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, text)`; `total` 0 where it is not known."""

F = TypeVar("F", bound=Callable[..., Any])

QUIET = 10.0
"""Seconds between two lines about the same work."""


def silent(done: int, total: int, text: str) -> None:
    """Say nothing."""


@contextlib.contextmanager
def shown() -> Iterator[Progress]:
    """A bar on a terminal; elsewhere a line on stderr every ten seconds and when the work changes; of rank 0 alone."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if int(os.environ.get("RANK", 0)):  # as the launcher says: the processes may not have joined yet
        yield silent
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        with Bar(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
            task = bar.add_task("")
            yield lambda done, total, text: bar.update(task, completed=done, total=total or None, description=text)
    else:
        yield _lines()


def showing(function: F) -> F:
    """Let a function with a callback `progress` also take True, for what the commands show, or False for nothing."""

    @functools.wraps(function)
    def run(*args: Any, progress: Progress | bool = False, **more: Any) -> Any:
        if callable(progress):
            return function(*args, progress=progress, **more)
        with shown() if progress else contextlib.nullcontext(silent) as told:
            return function(*args, progress=told, **more)

    return run


def _lines() -> Progress:
    kind, at = "", 0.0

    def line(done: int, total: int, text: str) -> None:
        nonlocal kind, at
        now, work = time.monotonic(), text.partition(":")[0]
        if work != kind or now - at > QUIET:
            kind, at = work, now
            print(f"{text} ({done}/{total})" if total else text, file=sys.stderr, flush=True)

    return line
