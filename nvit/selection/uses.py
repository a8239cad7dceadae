"""Where queues count in the latency table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Uses:
    """Where in one part of the latency table queues count: `queue[n]` is the width along `axis[n]` of `piece[n]`.

    An emb queue is used by every block of its stream, and by both neighbours in a merge; all others by their block.
    """

    queue: np.ndarray
    piece: np.ndarray
    axis: np.ndarray


def uses_of(owner: np.ndarray) -> Uses:
    """From the queue whose width each axis of each piece is, `(pieces, axes)`, or -1 where none prunes it."""
    piece, axis = (owner >= 0).nonzero()
    queue = owner[piece, axis]
    assert len(set(zip(queue, piece, strict=True))) == len(queue), "a group is two axes of one piece"
    return Uses(queue, piece, axis)
