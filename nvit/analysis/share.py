"""What a result keeps of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping


def kept(found: Mapping[str, float] | None, metric: str, name: str = "") -> dict[str, float | None]:
    """The metric that a task goes by, with its standard error where it has one; None where it was not measured.

    Args:
        found: what `accuracy` found.
        name: in place of the metric's own, as `top1_before`.
    """
    name, off = name or metric, f"{metric}_se"
    row = {name: None if found is None else found[metric]}
    return row | ({f"{name}_se": found[off]} if found is not None and off in found else {})
