"""How many bundles leave each queue when latency has a price: coordinate descent over the queues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..spec import KINDS
from .decision import Decision

SWEEPS = 20


@dataclass(frozen=True)
class PartAxis:
    """One axis of one part, along which queues of a side are the width of pieces.

    Attributes:
        rows: the queues that are, as rows of the side, `(queues,)`.
        piece, row: `piece[n]` has the width of queue `rows[row[n]]` along this axis.
        stream: the axis is a stream's, so that pieces which have left count no more.
        shares: of the grid's points at the width of every choice, `(queues, points, choices)`; see `Grid.shares`.
    """

    part: str
    axis: int
    rows: np.ndarray
    piece: np.ndarray
    row: np.ndarray
    shares: np.ndarray
    stream: bool


@dataclass(frozen=True)
class Side:
    """Queues that choose at once, since no piece has two of them as widths.

    Attributes:
        queues: their numbers, `(queues,)`.
        lost: saliency lost by every choice, `(queues, choices)`; infinite where a queue has fewer.
        axes: where their widths count.
    """

    queues: np.ndarray
    lost: np.ndarray
    axes: tuple[PartAxis, ...]


class Descent:
    """For a price of latency, the bundles to drop: every queue in turn takes its best choice, those of a side at once.

    The table is multilinear: the latency of a piece is its grid's values contracted with the shares of its widths, one
    row an axis. So the latency of *every* choice of one width costs one contraction over the others.
    """

    def __init__(self, decision: Decision) -> None:
        self.table, self.queues = decision.table, len(decision.queues)
        self.exits, self.last = decision.exits, decision.last
        self.lost = decision.lost
        self.there = {part: (decision.widths.flat[at] > 0).all(1) for part, at in self.table.at.items()}
        self.sides = [_side(decision, queues) for queues in independent(decision)]
        self.start = {
            part: [
                self.table.grids[part].shares(axis, widths) for axis, widths in enumerate(decision.widths.flat[at].T)
            ]
            for part, at in self.table.at.items()
        }

    def at(self, eta: float) -> tuple[np.ndarray, float]:
        """Bundles gone from every queue, and milliseconds, where no queue alone gains by another choice, nor does any
        sublayer by leaving whole or staying (see `Decision.gone`). Queues of one that has left choose as if it had not.

        Args:
            eta: price of one dense latency, in saliency.
        """
        shares = {part: [s.copy() for s in axes] for part, axes in self.start.items()}
        there = {part: t.copy() for part, t in self.there.items()}
        gone = np.zeros(self.queues, dtype=int)
        for _ in range(SWEEPS):
            before, there_before = gone.copy(), {part: t.copy() for part, t in there.items()}
            for side in self.sides:
                best = (side.lost + eta / self.table.dense_ms * self._latency_ms(side, shares, there)).argmin(1)
                gone[side.queues] = best
                for a in side.axes:
                    shares[a.part][a.axis][a.piece] = a.shares[a.row, :, best[a.rows][a.row]]
            ms = {part: contract(self.table.grids[part].monotone, axes) for part, axes in shares.items()}
            for way in self.exits.values():
                stays = (
                    self.lost[way.members, gone[way.members]].sum()
                    + eta / self.table.dense_ms * ms[way.part][way.piece]
                )
                there[way.part][way.piece] = stays <= way.cost
            if (gone == before).all() and all((there[part] == t).all() for part, t in there_before.items()):
                break
        for i, way in self.exits.items():
            if not there[way.part][way.piece]:
                gone[i] = self.last[i] + 1
        return gone, float(sum(ms[part][t].sum() for part, t in there.items()))

    def _latency_ms(self, side: Side, shares: dict[str, list[np.ndarray]], there: dict[str, np.ndarray]) -> np.ndarray:
        """Milliseconds, up to a constant, of every choice of every queue of a side: `(queues, choices)`."""
        total = np.zeros(side.lost.shape)
        for a in side.axes:
            by_piece = contract(self.table.grids[a.part].monotone, shares[a.part], keep=a.axis)
            if a.stream:
                by_piece = by_piece * there[a.part][:, None]
            by_queue = np.zeros((len(a.rows), by_piece.shape[1]))
            np.add.at(by_queue, a.row, by_piece[a.piece])
            total[a.rows] += (by_queue[:, None] @ a.shares)[:, 0]
        return total


def contract(values: np.ndarray, shares: Sequence[np.ndarray], keep: int | None = None) -> np.ndarray:
    """Grid values at the widths of every piece, `(pieces,)`; with one axis kept as it is, `(pieces, points)`.

    Args:
        values: one dimension an axis.
        shares: of every axis, `(pieces, points)`.
    """
    if keep is not None and len(shares) == 1:
        return np.broadcast_to(values, shares[0].shape)
    piece = len(shares)  # einsum's number for the dimension of pieces; the axes have theirs
    operands = [values, list(range(piece))]
    for axis, share in enumerate(shares):
        if axis != keep:
            operands += [share, [piece, axis]]
    return np.einsum(*operands, [piece] if keep is None else [piece, keep])


def independent(decision: Decision) -> list[list[int]]:
    """Queues of one kind that share no piece of any part, in as few lists as taking them block by block gives.

    The choice of one does not change what the others' choices save, so that they may all choose at once.
    """
    pieces: list[set[tuple[str, int]]] = [set() for _ in decision.queues]
    for part, uses in decision.uses.items():
        for queue, piece in zip(uses.queue.tolist(), uses.piece.tolist(), strict=True):
            pieces[queue].add((part, piece))

    groups = [q.group for q in decision.queues]
    found: list[list[int]] = []
    for kind in KINDS:
        of_kind: list[list[int]] = []
        for i in sorted((i for i, g in enumerate(groups) if g.kind == kind), key=lambda i: groups[i].blocks):
            free = (side for side in of_kind if all(pieces[i].isdisjoint(pieces[j]) for j in side))
            side = next(free, None)
            if side is None:
                of_kind.append(side := [])
            side.append(i)
        found += map(sorted, of_kind)
    return found


def _side(decision: Decision, queues: Sequence[int]) -> Side:
    choices = max(len(decision.queues[i].left) for i in queues)
    left, lost = decision.left[queues, :choices], decision.lost[queues, :choices]
    axes = []
    for part, uses in decision.uses.items():
        grid, mine = decision.table.grids[part], np.isin(uses.queue, queues)
        for axis in np.unique(uses.axis[mine]):
            here = mine & (uses.axis == axis)
            met, row = np.unique(uses.queue[here], return_inverse=True)
            rows = np.searchsorted(queues, met)
            shares = grid.shares(axis, left[rows]).swapaxes(1, 2).copy()
            axes.append(PartAxis(part, int(axis), rows, uses.piece[here], row, shares, grid.kinds[axis] == "emb"))
    return Side(np.array(queues), lost, tuple(axes))
