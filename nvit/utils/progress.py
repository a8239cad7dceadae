"""How long work tells of its progress: a callback, so that the library draws nothing."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, text)`; `total` 0 where it is not known."""


def silent(done: int, total: int, text: str) -> None:
    """Say nothing."""
