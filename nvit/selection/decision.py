"""A decision in the making: how many bundles have left each queue, and what the next ones would change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, from_numpy

from ..latency.table import LatencyTable, width_array
from ..spec import KINDS, Group, block_widths
from ..structure.masks import Masks, kept_counts
from .bundles import queue_of
from .exits import exits_of
from .uses import uses_of


class Decision:
    """How many bundles have left each queue, with the widths, latency and masks that makes.

    Attributes:
        queues: one for every group with a score.
        gone: bundles that have left each of them, `(queues,)`; one more than `last` where its sublayer has left whole.
        last: the bundles of each that may leave otherwise, `(queues,)`.
        widths: of every block, `(blocks, 5)`; 0 for what has left whole.
        exits: by queue, the sublayers that may leave whole.
        left, lost: the queues' own as rows, `(queues, choices)`; beyond the end of a queue its last width, and
            infinite saliency: the last bundle leaves with its sublayer or never.
        uses: of the queues, by part.

    Args:
        ends: what it costs that a sublayer leaves whole, by the group that it leaves with; all others stay.
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        masks: Masks,
        groups: Sequence[Group],
        table: LatencyTable,
        ends: Mapping[str, float] | None = None,
    ) -> None:
        self.table, self.before = table, masks
        self.widths = width_array(block_widths(groups, kept_counts(masks)))
        self.queues = [queue_of(g, scores[g.name], masks[g.name]) for g in groups if g.name in scores]
        self.gone = np.zeros(len(self.queues), dtype=int)
        self.last = np.array([len(q.left) - 1 for q in self.queues], dtype=int)

        # One entry more than the longest queue has, so that every choice has a next.
        shape = len(self.queues), 1 + max((len(q.left) for q in self.queues), default=0)
        self.left, self.lost = np.zeros(shape, dtype=int), np.full(shape, np.inf)
        for i, q in enumerate(self.queues):
            self.left[i] = q.left[-1]
            self.left[i, : len(q.left)] = q.left
            self.lost[i, : len(q.lost)] = q.lost

        owner = np.full(self.widths.shape, -1)
        for i, q in enumerate(self.queues):
            owner[list(q.group.blocks), KINDS.index(q.group.kind)] = i
        self.uses = {part: uses_of(owner.reshape(-1)[at]) for part, at in table.at.items()}
        self.exits = exits_of(self.queues, self.uses, ends or {})
        self._there = self.widths.copy()  # as if nothing left whole

    def has_left(self, queue: int) -> bool:
        """Whether the sublayer of a queue with an exit has left whole."""
        return bool(self.gone[queue] > self.last[queue])

    def saliency(self) -> np.ndarray:
        """I_S of each queue's next bundle, `(queues,)`; infinite where only the last one is left. Where its sublayer
        may leave with that, what it costs beyond what the sublayer's queues have lost."""
        each = np.arange(len(self.queues))
        now = self.lost[each, np.minimum(self.gone, self.last)]
        found = self.lost[each, np.minimum(self.gone + 1, self.lost.shape[1] - 1)] - now
        for i, way in self.exits.items():
            if self.has_left(i):
                found[way.members] = np.inf
            elif self._at_exit(i):
                found[i] = way.cost - now[way.members].sum()
        return found

    def _at_exit(self, queue: int) -> bool:
        return bool(self.gone[queue] == self.last[queue])

    def latency_saved(self) -> np.ndarray:
        """Lat(W) - Lat(W without S) of each queue's next bundle S, as a fraction of dense, `(queues,)`.

        A finite difference over the whole bundle, in every piece of every part that has the queue as a width. 0 where
        only the last bundle is left.
        """
        saved = np.zeros(len(self.queues))
        following = self.left[np.arange(len(self.queues)), np.minimum(self.gone + 1, self.left.shape[1] - 1)]
        ms_of = {}
        for part, use in self.uses.items():
            now = self._there.reshape(-1)[self.table.at[part]]
            here = (self.widths.reshape(-1)[self.table.at[part]] > 0).all(1)
            without = now[use.piece]
            without[np.arange(len(without)), use.axis] = following[use.queue]
            least = [points[0] for points in self.table.grids[part].axes]
            both = np.concatenate([now, without])
            ms = self.table.grids[part](np.where(both > 0, both, least))  # which of the grid does not count where 0
            ms_of[part] = ms[: len(now)]
            np.add.at(saved, use.queue, here[use.piece] * (ms[use.piece] - ms[len(now) :]))
        for i, way in self.exits.items():
            if self._at_exit(i):
                saved[i] = ms_of[way.part][way.piece]
        return saved / self.table.dense_ms

    def set_gone(self, queue: int, bundles: int) -> None:
        """Let so many bundles of one queue be gone, the first ones of its order; one more than there are lets its
        sublayer leave whole."""
        q = self.queues[queue]
        self.gone[queue] = bundles
        blocks = list(q.group.blocks)
        self._there[blocks, KINDS.index(q.group.kind)] = q.left[min(bundles, self.last[queue])]
        self.widths[blocks] = self._there[blocks]
        for i, way in self.exits.items():
            if way.block in blocks and self.has_left(i):
                self.widths[way.block, list(way.columns)] = 0

    def drop(self, queue: int) -> None:
        """Let the next bundle of one queue leave."""
        self.set_gone(queue, self.gone[queue] + 1)

    def latency_ms(self) -> float:
        """Milliseconds of the model as decided so far."""
        return self.table.ms(self.widths)

    def masks(self) -> Masks:
        """New masks without the bundles that are gone."""
        masks = {name: keep.clone() for name, keep in self.before.items()}
        for q, bundles in zip(self.queues, np.minimum(self.gone, self.last), strict=True):
            masks[q.group.name][from_numpy(q.order[: q.left[0] - q.left[bundles]])] = False
        for i, way in self.exits.items():
            for name in way.groups if self.has_left(i) else ():
                masks[name][:] = False
        return masks
