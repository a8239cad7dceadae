"""Every task by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..utils.registry import Registry

if TYPE_CHECKING:
    from .base import Task

_HOMES = {
    "classification": "classification.Classification",
    "multilabel": "multilabel.MultiLabel",
    "regression": "regression.Regression",
    "features": "features.Features",
    "segmentation": "segmentation.Segmentation",
}
"""File and class of each task, by the class's own `name`."""

TASKS: Mapping[str, type[Task]] = Registry(__package__, _HOMES)
