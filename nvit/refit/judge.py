"""How far a cut model is from the dense one once it is refitted, on images that the refit did not see."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import adapters
from ..calibration.capture import Place
from ..calibration.statistics import SiteStatistics
from ..spec import Group
from ..structure.masks import apply_
from ..tasks import Task
from ..tasks.nearness import Nearness
from ..utils.devices import portions, sent
from .refit import refit_

MEASURED, REFITTED = 96, 128
"""Images, at most, on which a distance is measured, and that refit a whole model."""


class Deal:
    """Deals images one by one, however they come in batches: 0 refits, 1 chooses the ridge, 2 measures."""

    def __init__(self) -> None:
        self.seen = self.shown = 0

    def next(self) -> int:
        others = self.seen - self.shown
        hand = 2 if self.seen % 4 == 1 and self.shown < MEASURED else int(others % 5 == 1)
        self.seen, self.shown = self.seen + 1, self.shown + (hand == 2)
        return hand

    def of(self, images: Tensor) -> list[Tensor]:
        """The images of a batch that go to each."""
        hands = torch.tensor([self.next() for _ in images])
        return [images[hands == hand] for hand in range(3)]


class Judge:
    """Takes calibration images, one of four to measure with until there are `MEASURED`, then tells distances.

    Attributes:
        few: the first images that refit, at most `REFITTED`; `refit_` holds back some of them.
        shown: images that measure, by batch; once they are all there, `near` compares answers to them with the dense
            model's.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        task: Task,
        *,
        statistics: Mapping[Place, SiteStatistics] | None = None,
        uniform: float = 0.2,
    ) -> None:
        """
        Args:
            model: prepared, dense.
            statistics, uniform: as in `refit_`.
        """
        self.model, self.groups, self.task = model, groups, task
        self.statistics, self.uniform = statistics, uniform
        self.deal, self.size = Deal(), 1
        self.few: list[Tensor] = []
        self.shown: list[Tensor] = []

    def take(self, images: Tensor) -> list[Tensor]:
        """A batch of calibration images; returns those that refit, and those that choose the ridge."""
        device = next(self.model.parameters()).device
        *refitting, measuring = (sent(x, device) for x in self.deal.of(images))
        self.size = max(self.size, len(images))
        self.shown += [measuring] if len(measuring) else []
        for x in refitting:
            left = REFITTED - sum(map(len, self.few))
            self.few += [x[:left]] if left > 0 and len(x) else []
        return refitting

    @torch.inference_mode()
    def ready(self) -> None:
        """All images are there.

        Raises:
            ValueError: none measures.
        """
        if not self.shown:
            raise ValueError(
                f"costs are measured on images of their own, and there are {self.deal.seen}; give at least 2"
            )
        shown = torch.cat(self.shown)
        self.shown = [x for batch in shown.split(self.size) for x in portions(batch, shown.device)]
        self.near = Nearness(self.task, self.model, self.shown)

    @torch.inference_mode()
    def of(self, masks: Mapping[str, Tensor]) -> Tensor:
        """The distance of the dense model cut by masks and refitted on `few`."""
        small = copy.deepcopy(self.model)
        apply_(small, self.groups, masks)
        if len(self.few) > 1:  # `refit_` needs two
            refit_(small, self.model, self.groups, self.few, statistics=self.statistics, uniform=self.uniform)
        return self.near.mean(adapters.of(self.model).logits(small, x) for x in self.shown)
