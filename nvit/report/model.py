"""What a page is made of: models with what is known of each, and the run they are from. Plain data, read nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..spec import BlockWidths
from ..utils.report import FORMATS

LOWER_IS_BETTER = ("mae", "rmse")
METRICS = ("top1", "mIoU", "mAP", "accuracy", "cosine", "mae", "rmse")
"""What tasks go by; a row's first of these is its quality."""

PERCENT = ("top1", "mIoU", "mAP", "accuracy")


@dataclass(frozen=True)
class Model:
    """A model of a run.

    Attributes:
        name: for people, as `pruned to 0.5`.
        target: of the dense latency; None of a dense model, or where nobody asked for one.
        row: plain values by the keys of `FORMATS`, those that are known and finite.
        dense: whether it is what the others are measured against.
        widths: of its blocks; empty where they are not known.
        tokens: how many enter its first block and leave each; empty where that is not known or blocks differ in it.
    """

    name: str
    row: Mapping[str, float]
    target: float | None = None
    dense: bool = False
    widths: tuple[BlockWidths, ...] = ()
    tokens: tuple[int, ...] = ()

    @property
    def ratio(self) -> float | None:
        """Latency as a fraction of the dense one's: measured, or else as predicted."""
        return 1.0 if self.dense else self.row.get("measured_ratio", self.row.get("predicted_ratio"))

    @property
    def measured(self) -> bool:
        """Whether `ratio` was."""
        return self.dense or "measured_ratio" in self.row


@dataclass(frozen=True)
class Run:
    """What a folder holds.

    Attributes:
        name: of the folder, for people.
        kind: prune, compare, finetune or snapshot.
        models: the dense one first, where there is one; then by falling target.
        absent: a sentence for each thing that a whole run has and this one has not.
        dense_widths: of the model that the others were cut from.
        setting: of the measurements by name: device, images a batch, dtype, mode.
        recipe, environment: plain values by name.
        history: rows of `history.csv`.
        title: of the model that was pruned.
        seconds: that the run took.
    """

    name: str
    kind: str
    models: tuple[Model, ...]
    absent: tuple[str, ...] = ()
    dense_widths: tuple[BlockWidths, ...] = ()
    setting: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, float], ...] = ()
    title: str = ""
    seconds: float | None = None

    @property
    def dense(self) -> Model | None:
        return next((m for m in self.models if m.dense), None)

    @property
    def pruned(self) -> tuple[Model, ...]:
        return tuple(m for m in self.models if not m.dense)

    @property
    def metric(self) -> str | None:
        """The key of the quality that its models have."""
        return next((k for k in METRICS if any(k in m.row for m in self.models)), None)

    def good(self, model: Model) -> float | None:
        """A model's quality as a number that grows with what is wanted."""
        value = model.row.get(self.metric or "")
        return -value if value is not None and self.metric in LOWER_IS_BETTER else value


def unit(metric: str) -> tuple[str, str]:
    """A metric's name and its unit for prose: `("top-1", "points")`."""
    head = FORMATS.get(metric, (metric,))[0]
    name = head.removesuffix(" %")
    return name, "points" if metric in PERCENT else f"of {name}"
