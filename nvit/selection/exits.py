"""Sublayers that may leave whole: what stays of the loss then, and which choices of queues count no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..spec import KINDS
from .bundles import Queue
from .uses import Uses


@dataclass(frozen=True)
class Exit:
    """A piece of the latency table that may leave, as the attention of a block.

    Attributes:
        queue: of the group whose last bundle it leaves with.
        members: all queues whose choices count only while it is there, `queue` among them.
        groups: that go to nothing with it.
        block: where it is; `columns`, its widths' places among `KINDS`.
        part, piece: its place in the latency table.
        cost: of all of it, in the unit of the queues' `lost`, from what is left now.
    """

    queue: int
    members: np.ndarray
    groups: tuple[str, ...]
    block: int
    columns: tuple[int, ...]
    part: str
    piece: int
    cost: float


def exits_of(queues: Sequence[Queue], uses: Mapping[str, Uses], costs: Mapping[str, float]) -> dict[int, Exit]:
    """The exits of the groups in `costs`, by queue."""
    number, found = {q.group.name: i for i, q in enumerate(queues)}, {}
    for name, cost in costs.items():
        i = number[name]
        group = queues[i].group
        assert group.ends is not None, f"{name}: its last bundle never leaves"
        part, piece = next((part, int(u.piece[u.queue == i][0])) for part, u in uses.items() if (u.queue == i).any())
        names = (name, *group.ends)
        kinds = (group.kind, *(end.rpartition(".")[2] for end in group.ends))
        members = np.array([number[n] for n in names if n in number])
        columns = tuple(KINDS.index(kind) for kind in kinds)
        found[i] = Exit(i, members, names, group.blocks[0], columns, part, piece, cost)
    return found
