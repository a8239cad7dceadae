"""What a criterion reads and gives, and the mean over batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..spec import Group
from .gradients import gate_gradients


@dataclass
class Evidence:
    """What one batch says about a model, for criteria to read.

    Attributes:
        params, grads: by parameter name; `grads` empty where weights are frozen.
        gates: per-sample gate gradients by group, `(batch, group.size)`, where they were recorded.
        over_ranks: a mean over ranks of tensors by name; gates are of this rank's samples, `grads` are means already.
    """

    params: Mapping[str, Tensor]
    grads: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Mapping[str, Tensor] | None = None
    seed: int = 0
    over_ranks: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict

    def gate_gradients(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """`(group.size,)` by group: recorded ones summed over samples, else from weights."""
        if self.gates is not None:
            return self.over_ranks({g.name: self.gates[g.name].sum(0) for g in groups})
        return gate_gradients(groups, self.params, self.grads)


Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Criterion:
    """A saliency, what it reads, and what turns its mean over batches into scores.

    Attributes:
        score: what one batch says, by group.
        reads: `gates` (per sample), `weights` (with gradients), `either`, or `nothing`.
        finish: from a group's mean over batches to its scores `(group.size,)`; None where it is them already.
    """

    score: Callable[[Sequence[Group], Evidence], Scores]
    reads: str
    finish: Callable[[Tensor], Tensor] | None = None

    def memory(self, groups: Sequence[Group]) -> int:
        """Bytes of what one batch says and of its mean over batches."""
        return 2 * 4 * sum(g.size if self.finish is None else g.size**2 for g in groups)

    def scores(self, mean: Mapping[str, Tensor]) -> Scores:
        """Saliency by group, `(group.size,)`, from the mean over batches."""
        return dict(mean) if self.finish is None else {name: self.finish(t) for name, t in mean.items()}


class RunningMean:
    """Mean of scores over batches: plain, or exponential with its start-up bias corrected (`momentum`)."""

    def __init__(self, momentum: float | None = None) -> None:
        self.momentum, self.count, self.sums = momentum, 0, {}

    def update(self, scores: Mapping[str, Tensor]) -> None:
        """Add one batch.

        Raises:
            ValueError: a score is not finite; the mean is left as it was.
        """
        for name, s in scores.items():
            if not bool(torch.isfinite(s).all()):
                raise ValueError(f"{name}: saliency is not finite after {self.count} good batches; the loss diverged")
        keep, add = (1.0, 1.0) if self.momentum is None else (self.momentum, 1 - self.momentum)
        for name, s in scores.items():
            self.sums[name] = self.sums[name].mul_(keep).add_(s, alpha=add) if name in self.sums else s * add
        self.count += 1

    def value(self) -> Scores:
        """The mean so far, by group."""
        if not self.count:
            raise ValueError("no batch has been scored yet; the loader gave none")
        weight = self.count if self.momentum is None else 1 - self.momentum**self.count
        return {name: s / weight for name, s in self.sums.items()}
