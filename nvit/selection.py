"""Which bundles leave: a pure function of scores, masks and latency table. Same input, same answer, on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, from_numpy

from .latency import LatencyTable
from .masks import Masks, kept_counts
from .spec import KINDS, Group, block_widths

_BISECTIONS = 40


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


class _State:
    """Widths of all blocks while bundles leave, with the latency of each choice."""

    def __init__(self, scores: Mapping[str, Tensor], masks: Masks, groups: Sequence[Group], table: LatencyTable):
        self.table, self.masks = table, masks
        every = block_widths(groups, kept_counts(masks))
        self.widths = np.array([[getattr(b, kind) for kind in KINDS] for b in every])
        self.queues = [_queue(g, scores[g.name], masks[g.name]) for g in groups if g.name in scores]
        self.gone = np.zeros(len(self.queues), dtype=int)

    def choices_ms(self, i: int) -> np.ndarray:
        """Latency of the blocks group `i` touches for every number of its bundles gone, everything else as it is."""
        q = self.queues[i]
        trial = np.repeat(self.widths[None, list(q.group.blocks)], len(q.left), 0)
        trial[:, :, KINDS.index(q.group.kind)] = q.left[:, None]
        ms = self.table.block_ms(trial).sum(1)
        return ms + self.table.rest_ms(trial[:, 0, 0]) if q.group.kind == "emb" else ms

    def next_saved(self) -> np.ndarray:
        """Latency saved by each group's next bundle, as a fraction of dense; 0 where only the last one is left."""
        now, trials, owner, saved = self.table.block_ms(self.widths), [], [], np.zeros(len(self.queues))
        for i, q in enumerate(self.queues):
            if self.gone[i] + 1 < len(q.left):
                blocks, kind = list(q.group.blocks), KINDS.index(q.group.kind)
                trial = self.widths[blocks]
                trial[:, kind] = q.left[self.gone[i] + 1]
                trials.append(trial)
                owner += [(i, b) for b in blocks]
                if q.group.kind == "emb":
                    before, after = self.table.rest_ms(np.array([self.widths[blocks[0], 0], trial[0, 0]]))
                    saved[i] += before - after
        if trials:
            i, b = np.array(owner).T
            np.add.at(saved, i, now[b] - self.table.block_ms(np.concatenate(trials)))
        return saved / self.table.dense_ms

    def next_lost(self) -> tuple[np.ndarray, np.ndarray]:
        """Saliency of each group's next bundle, and whether it may leave."""
        open_ = np.array([self.gone[i] + 1 < len(q.left) for i, q in enumerate(self.queues)], dtype=bool)
        ends = [min(k + 1, len(q.left) - 1) for k, q in zip(self.gone, self.queues, strict=True)]
        lost = [q.lost[end] - q.lost[k] for q, k, end in zip(self.queues, self.gone, ends, strict=True)]
        return np.array(lost), open_

    def set_gone(self, i: int, k: int) -> None:
        q = self.queues[i]
        self.gone[i] = k
        self.widths[list(q.group.blocks), KINDS.index(q.group.kind)] = q.left[k]

    def model_ms(self) -> float:
        return float(self.table.block_ms(self.widths).sum() + self.table.rest_ms(self.widths[:1, 0])[0])

    def new_masks(self) -> Masks:
        masks = {name: keep.clone() for name, keep in self.masks.items()}
        for q, k in zip(self.queues, self.gone, strict=True):
            masks[q.group.name][from_numpy(q.order[: q.left[0] - q.left[k]])] = False
        return masks


def drop_cheapest(
    scores: Mapping[str, Tensor],
    masks: Masks,
    groups: Sequence[Group],
    table: LatencyTable,
    bundles_per_step: int = 2,
    eta: float = 4.85e-4,
) -> Masks:
    """Remove the bundles with the lowest `saliency - eta * latency saved` (arXiv:2110.04869, Eq. 7), one by one.

    Bundles of all groups and blocks are ranked together; within a group units leave in order of saliency. The latency
    saved is the finite difference of the whole bundle, as a fraction of the table's dense latency.

    Args:
        scores: saliency by group, `(group.size,)`; groups without one keep all they have.
        eta: saliency one dense latency is worth.

    Returns:
        New masks; the arguments are unchanged. Equal to `masks` when only last bundles remain.
    """
    state = _State(scores, masks, groups, table)
    for _ in range(bundles_per_step):
        lost, open_ = state.next_lost()
        if not open_.any():
            break
        best = int(np.where(open_, lost - eta * state.next_saved(), np.inf).argmin())
        state.set_gone(best, state.gone[best] + 1)
    return state.new_masks()


def drop_to_target(
    scores: Mapping[str, Tensor], masks: Masks, groups: Sequence[Group], table: LatencyTable, target_ms: float
) -> tuple[Masks, float]:
    """Least saliency removed at `target_ms`: one shot, no training between decisions.

    For a price `eta` of latency every group in turn keeps the prefix of its queue that minimises saliency lost plus
    `eta` times latency, until none changes its mind; bisection on `eta` finds the lowest price that meets the target.

    Returns:
        Masks and `eta` in saliency per dense latency.

    Raises:
        ValueError: the target is below what the smallest widths allow.
    """
    state = _State(scores, masks, groups, table)
    if state.model_ms() <= target_ms:
        return state.new_masks(), 0.0

    def at(eta: float) -> float:
        for i in range(len(state.queues)):
            state.set_gone(i, 0)
        for _ in range(20):
            before = state.gone.copy()
            for i, q in enumerate(state.queues):
                cost = q.lost + eta * state.choices_ms(i) / table.dense_ms
                state.set_gone(i, int(cost.argmin()))
            if (state.gone == before).all():
                break
        return state.model_ms()

    low, high = 0.0, 1e-12
    while at(high) > target_ms:
        low, high = high, high * 16
        if high > 1e24:
            least = at(high)
            raise ValueError(
                f"latency target {target_ms / table.dense_ms:.3f} of dense cannot be met: the smallest allowed widths "
                f"reach {least / table.dense_ms:.3f}. Raise the target, or allow more groups to be pruned."
            )
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5 if low else high / 16
        low, high = (low, middle) if at(middle) <= target_ms else (middle, high)
    # Between the two prices lies one change of mind, which can be a large step: take its best bundles alone.
    at(low)
    while state.model_ms() > target_ms:
        lost, open_ = state.next_lost()
        price = np.where(open_, lost / np.maximum(state.next_saved(), 1e-12), np.inf)
        best = int(price.argmin())
        state.set_gone(best, state.gone[best] + 1)
    return state.new_masks(), high
