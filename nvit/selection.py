"""Which bundles leave: a pure function of scores, masks and latency table. Same input, same answer, on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, from_numpy

from .latency import PARTS, LatencyTable
from .masks import Masks, kept_counts
from .spec import KINDS, Group, block_widths

_BISECTIONS = 40
_SWEEPS = 20


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


class _Side:
    """One kind of width in `_Descent`: the groups that prune it and the widths each may choose.

    Attributes:
        queues: indices into the state's queues, `(groups,)`.
        owner, block: which of these groups is the width of which block, one pair each, ordered by group.
        lost: saliency lost by every choice, `(groups, choices)`; infinite where a group has fewer.
        shares: by part, grid shares of every choice, `(groups, choices, points)`.
    """

    def __init__(self, state: _State, kind: str) -> None:
        mine = [(i, q) for i, q in enumerate(state.queues) if q.group.kind == kind]
        self.kind, self.queues = kind, np.array([i for i, _ in mine], dtype=int)
        self.owner = np.array([g for g, (_, q) in enumerate(mine) for _ in q.group.blocks], dtype=int)
        self.block = np.array([b for _, q in mine for b in q.group.blocks], dtype=int)
        most = max(len(q.left) for _, q in mine)
        left = np.array([np.pad(q.left, (0, most - len(q.left)), mode="edge") for _, q in mine])
        self.lost = np.array([np.pad(q.lost, (0, most - len(q.lost)), constant_values=np.inf) for _, q in mine])
        grids = state.table.grids
        self.shares = {part: grids[part].shares(kind, left) for part, kinds in PARTS.items() if kind in kinds}


class _Descent:
    """For a price of latency, the bundles to drop: coordinate descent, all groups of a kind at once.

    The table is multilinear, so a block's latency is a contraction of grid values with the shares of its widths, and
    the latency of every choice of one width costs one contraction over the others. `shares[part, kind]` holds the
    current ones, `(blocks, points)`.
    """

    def __init__(self, state: _State) -> None:
        self.table, self.widths, self.queues = state.table, state.widths, len(state.queues)
        self.sides = [_Side(state, kind) for kind in KINDS if any(q.group.kind == kind for q in state.queues)]

    def at(self, eta: float) -> tuple[np.ndarray, float]:
        """Bundles gone from every queue, and milliseconds, where no group alone gains by another choice."""
        grids = self.table.grids
        self.shares = {
            (part, kind): grids[part].shares(kind, self.widths[:, KINDS.index(kind)])
            for part, kinds in PARTS.items()
            for kind in kinds
        }
        gone = np.zeros(self.queues, dtype=int)
        for _ in range(_SWEEPS):
            before = gone.copy()
            for side in self.sides:
                best = (side.lost + eta / self.table.dense_ms * self._choices_ms(side)).argmin(1)
                gone[side.queues] = best
                for part, shares in side.shares.items():
                    self.shares[part, side.kind][side.block] = shares[side.owner, best[side.owner]]
            if (gone == before).all():
                break
        ms = self._contract("attention").sum() + self._contract("mlp").sum() + self._contract("rest")[0]
        return gone, float(ms)

    def _contract(self, part: str, keep: str | None = None) -> np.ndarray:
        """Grid values by block at its current widths, `(blocks,)`; an axis `(blocks, points)` for the kind kept."""
        letters = dict(zip(PARTS[part], "ijkl", strict=False))
        others = [kind for kind in PARTS[part] if kind != keep]
        terms = ",".join(["".join(letters.values()), *("b" + letters[kind] for kind in others)])
        values = np.einsum(
            f"{terms}->b{letters.get(keep, '')}",
            self.table.grids[part].monotone,
            *(self.shares[part, k] for k in others),
        )
        return values

    def _choices_ms(self, side: _Side) -> np.ndarray:
        """Milliseconds, up to a constant, of every choice of every group of one kind: `(groups, choices)`."""
        total = np.zeros_like(side.lost)
        for part, shares in side.shares.items():
            if part == "rest":
                total += shares @ self.table.grids[part].monotone
                continue
            by_group = np.zeros((len(side.queues), shares.shape[-1]))
            np.add.at(by_group, side.owner, self._contract(part, side.kind)[side.block])
            total += (shares @ by_group[:, :, None])[:, :, 0]
        return total


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

    descent, enough = _Descent(state), target_ms * (1 + 1e-12)  # it adds up in another order than the table does
    # Prices above what is at stake are needed only where latency hardly changes.
    low, high = 0.0, max(float(sum(q.lost[-1] for q in state.queues)), 1e-30)
    while (found := descent.at(high))[1] > enough:
        low, high = high, high * 16
        if high > 1e24:
            raise ValueError(
                f"latency target {target_ms / table.dense_ms:.3f} of dense cannot be met: the smallest allowed widths "
                f"reach {found[1] / table.dense_ms:.3f}. Raise the target, or allow more groups to be pruned."
            )
    dear, cheap = found[0], descent.at(low)[0]
    for _ in range(_BISECTIONS):
        if np.abs(dear - cheap).sum() <= 1 or high < low * (1 + 1e-6):
            break
        middle = (low * high) ** 0.5 if low else high / 16
        gone, ms = descent.at(middle)
        low, high, cheap, dear = (low, middle, cheap, gone) if ms <= enough else (middle, high, gone, dear)
    for i, k in enumerate(cheap):
        state.set_gone(i, int(k))
    # Between the two prices lies one change of mind, which can be a large step: take its best bundles alone.
    while state.model_ms() > target_ms:
        lost, open_ = state.next_lost()
        if not open_.any():
            break
        price = np.where(open_, lost / np.maximum(state.next_saved(), 1e-12), np.inf)
        best = int(price.argmin())
        state.set_gone(best, state.gone[best] + 1)
    return state.new_masks(), high
