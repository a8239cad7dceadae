"""What a run was told, and what it ran on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .model import Run
from .section import Rows, Section

LOCAL = ("debug", "dump_config", "dry_run", "resume")
"""Settings that say nothing of what was done."""


def recipe(run: Run, defaults: Mapping[str, Any]) -> Section | None:
    """Every setting: first those that are not as they are by default."""
    if not run.recipe:
        return None
    told = {k: v for k, v in run.recipe.items() if k not in LOCAL}
    own = {k: v for k, v in told.items() if k not in defaults or v != in_json(defaults[k])}
    rest = {k: v for k, v in told.items() if k not in own}
    tables = [Rows("settings that were given", ("setting", "value"), _lines(own), words=True)]
    tables.append(Rows("all others", ("setting", "value"), _lines(rest), folded=True, words=True))
    return Section("Recipe", (), (), [t for t in tables if t.rows])


def environment(run: Run) -> Section | None:
    """Machine and versions."""
    if not run.environment:
        return None
    return Section(
        "Environment", (), (), [Rows("machine and versions", ("what", "found"), _lines(run.environment), words=True)]
    )


def in_json(value: Any) -> Any:
    """A value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _lines(values: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    return [(key.replace("_", " "), in_words(value)) for key, value in values.items()]


def in_words(value: Any) -> str:
    """`yes`, `0.9, 0.8`, `none`."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(in_words, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"
