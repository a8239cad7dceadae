"""Groups as queues of bundles, in the order in which they leave, and what each would save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, from_numpy

from ..latency.table import LatencyTable, width_array
from ..spec import KINDS, Group, block_widths
from ..structure.masks import Masks, kept_counts


@dataclass
class _Queue:
    """The kept units of one group in the order in which they leave, and what is left after each bundle.

    `left[k]` units remain and `lost[k]` saliency is gone once `k` bundles have left. The first bundle makes what
    remains a multiple of the bundle size; the last bundle never leaves.
    """

    group: Group
    order: np.ndarray
    left: np.ndarray
    lost: np.ndarray


def _queue(group: Group, score: Tensor, keep: Tensor) -> _Queue:
    kept = keep.cpu().numpy().nonzero()[0]
    score = score.detach().cpu().double().numpy()[kept]
    ascending = np.argsort(score, kind="stable")
    first = kept.size % group.multiple or group.multiple
    ends = np.r_[0, np.arange(first, kept.size, group.multiple)]
    lost = np.r_[0.0, np.cumsum(score[ascending])][ends]
    return _Queue(group, kept[ascending], kept.size - ends, lost)


@dataclass
class _Moves:
    """The axes of one part's pieces that queues prune: `queue[n]` prunes `axis[n]` of `piece[n]`."""

    queue: np.ndarray
    piece: np.ndarray
    axis: np.ndarray


class _State:
    """Widths of all blocks while bundles leave, with the latency of each choice.

    Attributes:
        widths: of every block, `(blocks, 5)`.
        gone: bundles that have left each queue, `(queues,)`.
        left, lost: the queues as rows, `(queues, choices)`; beyond the end of a queue its last entry.
        choices: entries of each queue, `(queues,)`.
        moves: by part.
    """

    def __init__(self, scores: Mapping[str, Tensor], masks: Masks, groups: Sequence[Group], table: LatencyTable):
        self.table, self.masks = table, masks
        self.widths = width_array(block_widths(groups, kept_counts(masks)))
        self.queues = [_queue(g, scores[g.name], masks[g.name]) for g in groups if g.name in scores]
        self.gone = np.zeros(len(self.queues), dtype=int)
        self.choices = np.array([len(q.left) for q in self.queues], dtype=int)
        # One entry more than the longest queue has, so that every choice has a next.
        entry = np.minimum(np.arange(self.choices.max(initial=0) + 1), self.choices[:, None] - 1)
        self.left = np.array([q.left[e] for q, e in zip(self.queues, entry, strict=True)])
        self.lost = np.array([q.lost[e] for q, e in zip(self.queues, entry, strict=True)])
        owner = np.full(self.widths.shape, -1)
        for i, q in enumerate(self.queues):
            owner[list(q.group.blocks), KINDS.index(q.group.kind)] = i
        self.moves = {name: _moves(owner.reshape(-1)[at]) for name, at in table.at.items()}

    def next_saved(self) -> np.ndarray:
        """Latency saved by each group's next bundle, as a fraction of dense; 0 where only the last one is left."""
        saved = np.zeros(len(self.queues))
        following = self.left[np.arange(len(self.queues)), self.gone + 1]
        for name, at in self.table.at.items():
            moves, now = self.moves[name], self.widths.reshape(-1)[at]
            trials = now[moves.piece]
            trials[np.arange(len(trials)), moves.axis] = following[moves.queue]
            ms = self.table.grids[name](np.concatenate([now, trials]))
            np.add.at(saved, moves.queue, ms[moves.piece] - ms[len(now) :])
        return saved / self.table.dense_ms

    def next_lost(self) -> tuple[np.ndarray, np.ndarray]:
        """Saliency of each group's next bundle, and whether it may leave."""
        each = np.arange(len(self.queues))
        return self.lost[each, self.gone + 1] - self.lost[each, self.gone], self.gone + 1 < self.choices

    def set_gone(self, i: int, k: int) -> None:
        q = self.queues[i]
        self.gone[i] = k
        self.widths[list(q.group.blocks), KINDS.index(q.group.kind)] = q.left[k]

    def model_ms(self) -> float:
        return self.table.ms(self.widths)

    def new_masks(self) -> Masks:
        masks = {name: keep.clone() for name, keep in self.masks.items()}
        for q, k in zip(self.queues, self.gone, strict=True):
            masks[q.group.name][from_numpy(q.order[: q.left[0] - q.left[k]])] = False
        return masks


def _moves(owner: np.ndarray) -> _Moves:
    """From the queue that prunes each axis of each piece, `(pieces, axes)`, or -1 where none does."""
    piece, axis = (owner >= 0).nonzero()
    queue = owner[piece, axis]
    assert len(set(zip(queue, piece, strict=True))) == len(queue), "a group is two axes of one piece"
    return _Moves(queue, piece, axis)
