"""The page: one HTML file that needs nothing beside it, every name from a user's files escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .. import __version__
from ..utils.files import write_atomically
from ..utils.progress import Progress, silent
from .card import card
from .model import Run
from .read import read
from .sections import sections

HERE = Path(__file__).parent
_MARKS = b'<meta name="generator" content="nvit report '
"""What every report has, so that another one may take its place."""


def build(runs: Sequence[Run], folders: Sequence[str], defaults: Mapping[str, Any] | None = None) -> str:
    """The page of some runs, in folders that say where their snapshots are; `defaults` as `report` takes them."""
    runs = _told_apart(runs)
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return env.get_template("page.html").render(
        title=", ".join(dict.fromkeys(run.title or run.name for run in runs)),
        generator=f"nvit report {__version__}",
        css=Markup((HERE / "page.css").read_text()),
        cards=[card(run, folder) for run, folder in zip(runs, folders, strict=True)],
        sections=sections(runs, defaults or {}),
    )


def report(
    paths: Sequence[str | Path],
    out: str | Path,
    defaults: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> list[Run]:
    """Write the page of the runs in some folders; returns them.

    Args:
        defaults: a recipe's, by name: what was set to them is shown folded.

    Raises:
        ValueError: a folder that a report cannot be of, or `out` is there and is no report.
    """
    out = Path(out)
    refuse_other(out)
    runs = []
    for i, path in enumerate(paths):
        progress(i, len(paths) + 1, f"reading {path}")
        runs.append(read(path))
    progress(len(paths), len(paths) + 1, "drawing figures")
    write_atomically(out, build(runs, [str(p) for p in paths], defaults).encode())
    progress(len(paths) + 1, len(paths) + 1, "written")
    return runs


def refuse_other(out: Path) -> None:
    """Raise ValueError where a report would be written over what is none."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder; --out takes the name of a page, as report.html")
    if out.exists():
        with out.open("rb") as f:
            if _MARKS not in f.read(2**12):
                raise ValueError(f"{out} is there and is no report of nvit's; choose another --out or remove it")


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs of one name get numbers."""
    seen: dict[str, int] = {}
    found = []
    for run in runs:
        seen[run.name] = n = seen.get(run.name, 0) + 1
        found.append(run if n == 1 else replace(run, name=f"{run.name} ({n})"))
    return found
