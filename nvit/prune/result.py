"""What a run returns: a compact model at each target, and the masks, history and table that led there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .. import parallel
from ..latency.table import LatencyTable
from ..structure import snapshot
from ..structure.masks import Masks
from .aim import Reading


@dataclass
class Pruned:
    """A compact model at one target.

    Attributes:
        target, predicted_ratio: fractions of the dense latency, asked for and by the table.
        metrics: plain values that go into the snapshot beside these two.
        reading: what was measured; None where the table's word counts.
    """

    target: float
    model: nn.Module
    predicted_ratio: float
    metrics: dict[str, Any] = field(default_factory=dict)
    reading: Reading | None = None

    @property
    def met(self) -> bool:
        """Whether the target is met: as measured, within the spread, or else by the table."""
        return self.predicted_ratio <= self.target if self.reading is None else self.reading.meets(self.target)

    @property
    def verdict(self) -> dict[str, Any]:
        """Plain values: met or not, judged by what, and the measured ratio with its spread where there is one."""
        if self.reading is None:
            return {"met": self.met, "judged_by": "table"}
        measured = {"measured_ratio": self.reading.measured, "measured_spread": self.reading.spread}
        return {"met": self.met, "judged_by": "clock"} | measured

    def in_words(self) -> str:
        """The verdict as a line."""
        word = "met" if self.met else "missed"
        if self.reading is None:
            return (
                f"target {self.target:g}: {word} by the table's word, {self.predicted_ratio:.3f} of the dense latency"
            )
        r = self.reading
        if r.misses(self.target) and self.met:
            word = "met, further than asked"
        return (
            f"target {self.target:g}: {word}, measured {r.measured:.3f} ± {r.spread:.3f} of the dense latency "
            f"(predicted {self.predicted_ratio:.3f})"
        )

    def save(self, path: str | Path) -> Path:
        """Write the snapshot folder (of several ranks, the first does)."""
        if not parallel.main():
            return Path(path)
        plain = {"target": self.target, "predicted_ratio": self.predicted_ratio} | self.verdict | self.metrics
        return snapshot.save(path, self.model, plain)


@dataclass
class PruneResult:
    """What `prune` returns.

    Attributes:
        snapshots: a compact model for each target, largest first.
        masks: of the last one, on the dense model.
        history: a row per decision.
        table: the latency table that decided.
        dense: a copy of the model as it was given; None under a budget, which is not spent on one.
        memory: under a budget, what `Budget.report` says.
        criterion: what the saliency was.
    """

    snapshots: list[Pruned]
    masks: Masks
    history: list[dict[str, Any]]
    table: LatencyTable
    dense: nn.Module | None
    memory: dict[str, Any] | None = None
    criterion: str = ""

    @property
    def model(self) -> nn.Module:
        """The compact model at the smallest target."""
        return self.snapshots[-1].model

    def save(self, path: str | Path) -> Path:
        """Write the snapshot folder of the smallest target; `snapshots[i].save` writes another."""
        return self.snapshots[-1].save(path)
