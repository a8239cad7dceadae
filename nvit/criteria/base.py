"""The protocol of every criterion (begin, observe, finish), what it can do as data, and the mean over batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..calibration.capture import Place
from ..calibration.statistics import SiteStatistics
from ..spec import Group
from ..tasks import Task
from ..utils import devices
from .gradients import gate_gradients

Scores = dict[str, Tensor]
"""Saliency by group, `(group.size,)`; larger is worse to remove."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a criterion needs and where it works, as data that configs, runs and commands ask.

    Attributes:
        images: it reads passes over images; otherwise weights alone.
        labels: what is sent backward is the loss of labels, the data's or drawn ones.
        weight_gradients: it needs gradients of weights; otherwise scoring freezes them, which is faster and smaller.
        training: it reads the gradient of any loss, so that a training step's, or your own, will do.
        ranks: several processes may share its batches.
        budget: a batch may come in parts, and `Criterion.memory` bounds what it keeps.
    """

    images: bool = True
    labels: bool = True
    weight_gradients: bool = False
    training: bool = True
    ranks: bool = True
    budget: bool = True


@dataclass(frozen=True)
class Context:
    """What a criterion is to judge.

    Attributes:
        model: prepared and masked.
        groups: those that may shrink.
        masks: of all groups.
        scoring: weights stay as they are and the criterion says what is sent backward; otherwise somebody trains.
        over_ranks: a mean over ranks of tensors by name.
        statistics: of this very model, where they have been gathered already.
        task: what the model is for; the one that it tells if None.
    """

    model: nn.Module
    groups: Sequence[Group]
    masks: Mapping[str, Tensor]
    scoring: bool = False
    seed: int = 0
    over_ranks: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    statistics: Mapping[Place, SiteStatistics] | None = None
    task: Task | None = None


@dataclass
class Evidence:
    """What one batch says about a model.

    Attributes:
        params, grads: by parameter name; `grads` empty where weights are frozen, means over ranks elsewhere.
        gates: per-sample gate gradients of this rank's samples by group, `(batch, group.size)`, where recorded.
        over_ranks: as in `Context`.
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


class Criterion(ABC):
    """What losing a unit costs, for one run: `begin`, after every backward pass `observe`, at a decision `finish`.

    A subclass is one idea. It names itself, says what it can do, and stands in `registry.CRITERIA`.

    Attributes:
        context: of the last `begin`.
        batches: observed so far.
        mean: of what batches said; part of a training run's state.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def __init__(self, momentum: float | None = None) -> None:
        self.context: Context | None = None
        self.open, self.batches = False, 0
        self.mean = RunningMean(momentum)

    @property
    def wants_images(self) -> bool:
        """Whether passes over images have to be made for it."""
        return self.capabilities.images

    def begin(self, context: Context) -> None:
        """Put captures on the model, if it needs any, until `close`. Again, with new masks or another model, what was
        observed stays."""
        self.close()
        self.context, self.open = context, True

    def backward(self, logits: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        """Scoring: send backward what this criterion reads; `loss` of the logits, unless it has a signal of its own.

        Called for every part of a batch, with the logits `(images, classes)` of that part.
        """
        loss(logits).backward()

    def observe(self, batch: Evidence) -> None:
        """Add what the last batch said, once its backward passes are through."""
        self.batches += 1

    @abstractmethod
    def finish(self) -> Scores:
        """Saliency from all batches so far; observing may go on afterwards.

        Raises:
            ValueError: nothing has been observed.
        """

    def decided(self) -> None:
        """A training run has decided on `finish`."""
        self.mean.decided()

    def replayed(self) -> None:
        """A batch was observed by a captured step, which runs no Python."""
        self.batches += 1
        self.mean.count += 1

    def close(self) -> None:
        """Take captures off the model; what was observed stays. Again, it does nothing."""
        self.open = False


class BatchMean(Criterion):
    """A criterion that is a function of one batch, averaged over batches."""

    @staticmethod
    @abstractmethod
    def score(groups: Sequence[Group], batch: Evidence) -> dict[str, Tensor]:
        """What one batch says, by group."""

    @staticmethod
    def scores(mean: Mapping[str, Tensor]) -> Scores:
        """Saliency from the mean over batches of what they said."""
        return dict(mean)

    @staticmethod
    def memory(groups: Sequence[Group]) -> int:
        """Bytes of what one batch says and of its mean over batches."""
        return 2 * 4 * sum(g.size for g in groups)

    def observe(self, batch: Evidence) -> None:
        """Add what a batch says.

        Raises:
            ValueError: a score is not finite; the mean is left as it was.
        """
        self.mean.update(self.score(self.context.groups, batch))
        super().observe(batch)

    def finish(self) -> Scores:
        return self.scores(self.mean.value())


class RunningMean:
    """Mean of scores over batches: of all of them or, with `momentum`, of those since the last decision, exponentially
    averaged over decisions with the start-up bias corrected (the published runs: 0.9).

    Off the CPU nothing is read back until `value`.

    Attributes:
        count: batches since the last decision.
        sums: of what they said.
        decisions: so far; `past` is their exponential average, biased toward 0.
    """

    def __init__(self, momentum: float | None = None) -> None:
        self.momentum, self.count, self.decisions = momentum, 0, 0
        self.sums: dict[str, Tensor] = {}
        self.past: dict[str, Tensor] = {}

    def update(self, scores: Mapping[str, Tensor]) -> None:
        """Add one batch.

        Raises:
            ValueError: a score on the CPU is not finite; the mean is left as it was.
        """
        for name, s in scores.items():
            if devices.reading_is_free(s.device) and not bool(torch.isfinite(s).all()):
                raise ValueError(f"{name}: saliency is not finite after {self.count} good batches; the loss diverged")
        for name, s in scores.items():
            self.sums[name] = self.sums[name].add_(s) if name in self.sums else s.clone()
        self.count += 1

    def value(self) -> Scores:
        """The mean so far, by group.

        Raises:
            ValueError: no batch was added, or a score was not finite.
        """
        if not self.count:
            raise ValueError("no batch has been scored yet; the loader gave none")
        found = {name: s / self.count for name, s in self.sums.items()}
        if self.momentum is not None:
            found = {name: self._blended(name, now) for name, now in found.items()}
            unbias = 1 - self.momentum ** (self.decisions + 1)
            found = {name: blended / unbias for name, blended in found.items()}
        for name, s in found.items():
            if not bool(torch.isfinite(s).all()):
                raise ValueError(f"{name}: saliency is not finite within {self.count} batches; the loss diverged")
        return found

    def _blended(self, name: str, now: Tensor) -> Tensor:
        before = self.past.get(name, 0.0)
        return self.momentum * before + (1 - self.momentum) * now

    def decided(self) -> None:
        """A decision was taken on `value`: what comes from now on counts as a mean of its own. `sums` keep their
        memory."""
        if self.momentum is None or not self.count:
            return
        self.past = {name: self._blended(name, s / self.count) for name, s in self.sums.items()}
        self.decisions += 1
        self.count = 0
        for s in self.sums.values():
            s.zero_()
