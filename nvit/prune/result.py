"""What a run returns: a compact model at each target, and the masks, history and table that led there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import parallel
from ..latency.table import LatencyTable
from ..structure import snapshot
from ..structure.masks import Masks
from . import display
from .aim import Reading

if TYPE_CHECKING:
    import pandas


@dataclass(repr=False)
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

    def __repr__(self) -> str:
        return f"Pruned({self.target:g}: {self._found()})"

    def _found(self) -> str:
        ratios, measured = f"predicted {self.predicted_ratio:.3f}", (self.verdict | self.metrics).get("measured_ratio")
        if measured is not None:
            ratios += f", measured {measured:.3f}"
        return f"{ratios}, {'met' if self.met else 'missed'}, {_parameters(self.model) / 1e6:.3g} M parameters"

    def row(self) -> dict[str, Any]:
        """`name`, `target`, `predicted_ratio`, `params`, the verdict and the metrics."""
        known = {"target": self.target, "predicted_ratio": self.predicted_ratio, "params": _parameters(self.model)}
        return {"name": f"target {self.target:g}"} | known | self.verdict | self.metrics

    def save(self, path: str | Path) -> Path:
        """Write the snapshot folder (of several ranks, the first does)."""
        if not parallel.main():
            return Path(path)
        plain = {"target": self.target, "predicted_ratio": self.predicted_ratio} | self.verdict | self.metrics
        return snapshot.save(path, self.model, plain)


@dataclass(repr=False)
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

    >>> model = nvit.load(nvit.BUNDLED)
    >>> loader = nvit.data.evaluation_loader(nvit.data.Digits(training=True), 16)
    >>> config = nvit.PruneConfig(latency_target=(0.8, 0.5), train=False, score_batches=1)
    >>> result = nvit.prune(model, loader, config, nvit.LatencyTable.analytic(model))
    >>> [row["target"] for row in result.rows()], result.model is result.snapshots[-1].model
    ([0.8, 0.5], True)
    >>> nvit.load(result.save("half")).training
    False
    """

    snapshots: list[Pruned]
    masks: Masks
    history: list[dict[str, Any]]
    table: LatencyTable
    dense: nn.Module | None
    memory: dict[str, Any] | None = None
    criterion: str = ""

    def __repr__(self) -> str:
        dense = "" if self.dense is None else f"; dense {_parameters(self.dense) / 1e6:.3g} M"
        found = "; ".join(f"{p.target:g}: {p._found()}" for p in self.snapshots)
        return f"PruneResult({self.criterion}, {len(self.history)} decisions; {found}{dense})"

    def _repr_html_(self) -> str:
        models = {f"target {p.target:g}": snapshot.spec_of(p.model).blocks for p in self.snapshots}
        title = f"pruned by {self.criterion} in {len(self.history)} decisions"
        return display.page(title, [*self._dense_row(), *self.rows()], self.table.dense, models)

    def rows(self) -> list[dict[str, Any]]:
        """A row per target: `name`, `target`, `predicted_ratio`, `params`, and what was measured."""
        return [p.row() for p in self.snapshots]

    def _dense_row(self) -> list[dict[str, Any]]:
        if self.dense is None:
            return []
        return [{"name": "dense", "predicted_ratio": 1.0, "params": _parameters(self.dense)}]

    def to_frame(self) -> pandas.DataFrame:
        """`rows` as a pandas DataFrame, the dense model (target 1) first where the result has it.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        dense = [row | {"target": 1.0} for row in self._dense_row()]
        return display.frame([*dense, *self.rows()])

    @property
    def model(self) -> nn.Module:
        """The compact model at the smallest target."""
        return self.snapshots[-1].model

    def save(self, path: str | Path) -> Path:
        """Write the snapshot folder of the smallest target; `snapshots[i].save` writes another."""
        return self.snapshots[-1].save(path)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
