"""Snapshots, under the name that users import: `nvit.structure.snapshot`."""

from .structure.snapshot import BUNDLED, fresh, is_snapshot, load, load_metrics, load_spec, save, spec_of

__all__ = ["BUNDLED", "fresh", "is_snapshot", "load", "load_metrics", "load_spec", "save", "spec_of"]
