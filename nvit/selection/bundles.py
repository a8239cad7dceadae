"""Groups as queues of bundles, in the order in which they leave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..spec import Group


def units_gone(units: int, multiple: int) -> np.ndarray:
    """How many of a group's `units` are gone once 0, 1, 2, … bundles have left.

    The rule of bundles: the first one makes what remains a multiple of the bundle size, so that it has `units` modulo
    `multiple` units if that is not zero. All others have `multiple`, and the last one never leaves: 3 heads in bundles
    of 2 give `[0, 1]`, 40 channels in bundles of 16 give `[0, 8, 24]`.
    """
    first = units % multiple or multiple
    return np.r_[0, np.arange(first, units, multiple)]


@dataclass(frozen=True)
class Queue:
    """The kept units of one group in the order in which they leave, and what is left after each bundle.

    Attributes:
        order: units by their number in the group, least saliency first, `(kept,)`.
        left: units that remain once 0, 1, 2, … bundles have left, `(choices,)`.
        lost: saliency that is gone with those bundles, `(choices,)`; a bundle's is the sum over its units.
    """

    group: Group
    order: np.ndarray
    left: np.ndarray
    lost: np.ndarray


def queue_of(group: Group, score: Tensor, keep: Tensor) -> Queue:
    """The queue of the units that `keep` keeps, both `(group.size,)`."""
    kept = keep.cpu().numpy().nonzero()[0]
    saliency = score.detach().cpu().double().numpy()[kept]
    ascending = np.argsort(saliency, kind="stable")
    gone = units_gone(kept.size, group.multiple)
    lost = np.r_[0.0, np.cumsum(saliency[ascending])][gone]
    return Queue(group, kept[ascending], kept.size - gone, lost)
