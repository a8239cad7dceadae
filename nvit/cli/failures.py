"""What a person sees of an error that ends a command: one line, and the traceback in a file where nobody foresaw it."""

from __future__ import annotations

import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..utils.files import short, write_atomically
from ..utils.launch import launched

PACKAGE = Path(__file__).parents[1]
TRACEBACK = "nvit-traceback.txt"


def say(error: object) -> None:
    """An error's one line; of several processes, by the first that has one."""
    process = sys.modules.get("nvit.parallel.process")  # not there before a command's work has begun
    if process.speaks() if process else launched()[0] == 0:
        print(f"nvit: {' '.join(str(error).split())}", file=sys.stderr)


def explain(error: Exception, args: Sequence[str], out: str = "", *, debug: bool = False) -> None:
    """Say why a command failed. An error that was not foreseen has its traceback kept beside what the run has written.

    Args:
        args: the command line.
        out: the command's folder, if it has one.
        debug: print the traceback instead, of any error.
    """
    if debug:
        traceback.print_exception(error)
    if foreseen(error):
        return say(error)
    said = f"{type(error).__name__}: {short(error, 200)}"
    if debug:
        return say(f"{said}; nobody foresaw that: please report the traceback above")
    kept = _keep(error, args, out)
    return say(f"{said}; nobody foresaw that: {kept or 'give --debug to see the traceback'}")


def foreseen(error: Exception) -> bool:
    """Whether an error's own words say what was found and what to do: what this package refuses, and what the system
    refuses. A ValueError out of another library was meant for whoever calls that."""
    if isinstance(error, (OSError, FloatingPointError, ModuleNotFoundError)):
        return True
    if type(error).__module__.partition(".")[0] == PACKAGE.name:  # also out of a data loading process
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)


def _keep(error: Exception, args: Sequence[str], out: str) -> str:
    """Where the traceback lies now, in words; empty where no folder can be written."""
    head = f"nvit {__version__}, python {platform.python_version()}, {platform.platform()}\nnvit {shlex.join(args)}\n\n"
    text = head + "".join(traceback.format_exception(error))
    rank = launched()[0]
    name = f"rank{rank}-{TRACEBACK}" if rank else TRACEBACK
    for folder in (out or ".", ".", tempfile.gettempdir()):
        try:
            write_atomically(Path(folder) / name, text.encode())
        except OSError:
            continue
        return f"please report {Path(folder) / name}, which has the traceback"
    return ""
