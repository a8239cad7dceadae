"""Snapshots and run states, under the name that users import: `nvit.structure.snapshot`, `nvit.structure.run_state`."""

from . import sparse24  # noqa: F401  (what `load` does at last where weights are 2:4 sparse)
from .structure.run_state import load_run_state, save_run_state
from .structure.snapshot import (
    BUNDLED,
    MANIFEST,
    METRICS,
    SPEC,
    WEIGHTS,
    fresh,
    is_snapshot,
    load,
    load_metrics,
    load_spec,
    save,
    spec_of,
)

__all__ = [
    "BUNDLED",
    "MANIFEST",
    "METRICS",
    "SPEC",
    "WEIGHTS",
    "fresh",
    "is_snapshot",
    "load",
    "load_metrics",
    "load_run_state",
    "load_spec",
    "save",
    "save_run_state",
    "spec_of",
]
