"""One shot: least saliency removed at a latency, by the price of latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from string import ascii_lowercase

import numpy as np
from torch import Tensor

from ..latency.table import LatencyTable
from ..spec import KINDS, Group
from ..structure.masks import Masks
from .bundles import _State

_BISECTIONS = 40


_SWEEPS = 20


def _independent(state: _State) -> list[list[int]]:
    """Queues of one kind that share no piece of any part, in as few lists as taking them block by block gives.

    The choice of one does not change what the others' choices save, so that they may all choose at once.
    """
    pieces: list[set[tuple[str, int]]] = [set() for _ in state.queues]
    for name, moves in state.moves.items():
        for i, piece in zip(moves.queue.tolist(), moves.piece.tolist(), strict=True):
            pieces[i].add((name, piece))
    found: list[list[int]] = []
    in_order = sorted(range(len(state.queues)), key=lambda i: state.queues[i].group.blocks)
    for kind in KINDS:
        mine: list[tuple[list[int], set[tuple[str, int]]]] = []
        for i in in_order:
            if state.queues[i].group.kind == kind:
                queues, taken = next((m for m in mine if m[1].isdisjoint(pieces[i])), ([], set()))
                if not queues:
                    mine.append((queues, taken))
                queues.append(i)
                taken |= pieces[i]
        found += [sorted(queues) for queues, _ in mine]
    return found


@dataclass
class _Reach:
    """The pieces of one part in which groups of a side are the width along one axis.

    Attributes:
        groups: of the side, those that are, `(groups,)`.
        owner, piece: which of these is the width of which piece, one pair each, ordered by group.
        first: each group's first pair, `(groups,)`.
        shares: grid shares of every choice, `(groups, points, choices)`.
    """

    part: str
    axis: int
    groups: np.ndarray
    owner: np.ndarray
    piece: np.ndarray
    first: np.ndarray
    shares: np.ndarray


class _Side:
    """Groups in `_Descent` that choose at once, and the widths each may choose.

    Attributes:
        queues: indices into the state's queues, `(groups,)`.
        lost: saliency lost by every choice, `(groups, choices)`; infinite where a group has fewer.
        reaches: where these widths matter.
    """

    def __init__(self, state: _State, queues: Sequence[int]) -> None:
        self.queues = np.array(queues, dtype=int)
        choices = state.choices[self.queues]
        left = state.left[self.queues, : choices.max()]
        self.lost = np.where(
            np.arange(choices.max()) < choices[:, None], state.lost[self.queues, : choices.max()], np.inf
        )
        self.reaches = []
        for name, moves in state.moves.items():
            for axis in range(state.table.at[name].shape[1]):
                mine = ((moves.axis == axis) & np.isin(moves.queue, self.queues)).nonzero()[0]
                if mine.size:
                    mine = mine[np.argsort(moves.queue[mine], kind="stable")]
                    met, first, owner = np.unique(moves.queue[mine], return_index=True, return_inverse=True)
                    groups = np.searchsorted(self.queues, met)
                    shares = state.table.grids[name].shares(axis, left[groups]).swapaxes(1, 2).copy()
                    self.reaches.append(_Reach(name, axis, groups, owner, moves.piece[mine], first, shares))


class _Descent:
    """For a price of latency, the bundles to drop: coordinate descent, all groups that share no piece at once.

    The table is multilinear, so a piece's latency is a contraction of grid values with the shares of its widths, and
    the latency of every choice of one width costs one contraction over the others. `shares[part][axis]` holds the
    current ones, `(pieces, points)`.
    """

    def __init__(self, state: _State) -> None:
        self.table, self.queues = state.table, len(state.queues)
        self.sides = [_Side(state, queues) for queues in _independent(state)]
        self.start = {
            name: [self.table.grids[name].shares(axis, widths) for axis, widths in enumerate(state.widths.flat[at].T)]
            for name, at in self.table.at.items()
        }

    def at(self, eta: float) -> tuple[np.ndarray, float]:
        """Bundles gone from every queue, and milliseconds, where no group alone gains by another choice."""
        self.shares = {name: [shares.copy() for shares in axes] for name, axes in self.start.items()}
        gone = np.zeros(self.queues, dtype=int)
        for _ in range(_SWEEPS):
            before = gone.copy()
            for side in self.sides:
                best = (side.lost + eta / self.table.dense_ms * self._choices_ms(side)).argmin(1)
                gone[side.queues] = best
                for r in side.reaches:
                    self.shares[r.part][r.axis][r.piece] = r.shares[r.owner, :, best[r.groups][r.owner]]
            if (gone == before).all():
                break
        return gone, float(sum(self._contract(name).sum() for name in self.shares))

    def _contract(self, part: str, keep: int | None = None) -> np.ndarray:
        """Grid values by piece at its current widths, `(pieces,)`; `(pieces, points)` with one axis kept."""
        values, shares = self.table.grids[part].monotone, self.shares[part]
        if keep is not None and len(shares) == 1:
            return np.broadcast_to(values, shares[0].shape)
        others = [s for axis, s in enumerate(shares) if axis != keep]
        return np.einsum(_contraction(len(shares), keep), values, *others)

    def _choices_ms(self, side: _Side) -> np.ndarray:
        """Milliseconds, up to a constant, of every choice of every group of a side: `(groups, choices)`."""
        total = np.zeros_like(side.lost)
        for r in side.reaches:
            by_group = np.add.reduceat(self._contract(r.part, r.axis)[r.piece], r.first)
            total[r.groups] += (by_group[:, None] @ r.shares)[:, 0]
        return total


@cache
def _contraction(axes: int, keep: int | None) -> str:
    """einsum's subscripts, as `abc,za,zc->zb`: grid values and each other axis's shares to values by piece `z`."""
    letters = ascii_lowercase[:axes]
    others = [letter for axis, letter in enumerate(letters) if axis != keep]
    return f"{','.join([letters, *(f'z{letter}' for letter in others)])}->z{'' if keep is None else letters[keep]}"


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
