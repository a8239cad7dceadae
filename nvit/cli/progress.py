"""How long work tells a person of its progress."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from .. import parallel
from ..utils.progress import Progress, silent

QUIET = 10.0
"""Seconds between two lines about the same work."""


@contextlib.contextmanager
def shown() -> Iterator[Progress]:
    """A bar on a terminal; elsewhere a line on stderr every ten seconds and when the work changes; of rank 0 alone."""
    console = Console(stderr=True)
    if not parallel.main():
        yield silent
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        with Bar(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
            task = bar.add_task("")
            yield lambda done, total, text: bar.update(task, completed=done, total=total or None, description=text)
    else:
        yield _lines()


def say(line: str) -> None:
    """A line that a person should see whatever else is shown; of rank 0 alone."""
    if parallel.main():
        print(line, file=sys.stderr, flush=True)


def _lines() -> Progress:
    kind, at = "", 0.0

    def line(done: int, total: int, text: str) -> None:
        nonlocal kind, at
        now, work = time.monotonic(), text.partition(":")[0]
        if work != kind or now - at > QUIET:
            kind, at = work, now
            print(f"{text} ({done}/{total})" if total else text, file=sys.stderr, flush=True)

    return line
