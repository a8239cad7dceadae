"""What a command says while it works."""

from __future__ import annotations

import sys

from .. import parallel
from ..utils.progress import shown

__all__ = ["say", "shown"]


def say(line: str) -> None:
    """A line that a person should see whatever else is shown; of rank 0 alone."""
    if parallel.main():
        print(line, file=sys.stderr, flush=True)
