"""What decides the course of a run, kept in its state, so that it goes on only as it began."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..config import FinetuneConfig, PruneConfig, TrainingConfig

WITHOUT_EFFECT = {"save_every", "fsdp", "graphs"}
"""Settings that do not change the course of a run."""


def recipe_of(config: TrainingConfig) -> dict[str, Any]:
    """The settings that do, as JSON gives them back."""
    names = {f.name for base in (PruneConfig, FinetuneConfig) for f in fields(base)} - WITHOUT_EFFECT
    return json.loads(json.dumps({k: v for k, v in asdict(config).items() if k in names}))


def refuse_other(file: Path, theirs: Mapping[str, Any], config: TrainingConfig) -> None:
    """Raise ValueError where a state is of a run with another recipe."""
    mine = recipe_of(config)
    if differing := sorted(k for k in theirs.keys() | mine.keys() if theirs.get(k) != mine.get(k)):
        k = differing[0]
        raise ValueError(
            f"{file} is of a run with {k} {theirs.get(k)}, this one has {mine.get(k)}. "
            "Resume with the same recipe, or start anew without --resume."
        )
