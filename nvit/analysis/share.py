"""What a result keeps of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping

BESIDE = ("pixel_accuracy",)
"""Metrics that are shown beside the one that a task goes by."""


def kept(found: Mapping[str, float] | None, metric: str, name: str = "") -> dict[str, float | None]:
    """The metric that a task goes by, with its standard error where it has one; None where it was not measured.

    Args:
        found: what `accuracy` found.
        name: in place of the metric's own, as `top1_before`.
    """
    beside = {} if name or found is None else {key: found[key] for key in BESIDE if key in found}
    name, off = name or metric, f"{metric}_se"
    row = {name: None if found is None else found[metric]} | beside
    return row | ({f"{name}_se": found[off]} if found is not None and off in found else {})
