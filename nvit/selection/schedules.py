"""How many tokens merge in each block: families of one parameter, since costs of merging do not add up over blocks."""

from __future__ import annotations

from collections.abc import Callable

Merges = tuple[int, ...]
Family = Callable[[int, int, int, float], Merges]


def constant_share(tokens: int, prefix: int, depth: int, strength: float) -> Merges:
    """Every block passes on the same share of the tokens that may merge, so that most leave early and few late.

    Args:
        tokens: that enter the first block, of which `prefix` never merge.
        strength: 0 for none; at 1 every block merges half of them, the most that can.
    """
    left, share, found = float(tokens - prefix), 1 - strength / 2, []
    for _ in range(depth):
        whole = tokens - prefix - sum(found)
        left *= share
        found.append(min(max(0, whole - round(left)), whole // 2))
    return tuple(found)


def sloped(slope: float) -> Family:
    """Every block merges so many, changing evenly with depth.

    Args:
        slope: in [-1, 1]; the first block merges 1 + slope times the mean and the last 1 - slope. 0 is ToMe's own
            schedule (arXiv:2210.09461).
    """

    def family(tokens: int, prefix: int, depth: int, strength: float) -> Merges:
        """At strength 1 a block merges half of all tokens that may; always at most half of those that are left."""
        most, wanted, found = strength * (tokens - prefix) / 2 / (1 + abs(slope)), 0.0, []
        for i in range(depth):
            wanted += most * (1 + slope * (1 - 2 * i / max(1, depth - 1)))
            left = tokens - prefix - sum(found)
            found.append(max(0, min(round(wanted) - sum(found), left // 2)))
        return tuple(found)

    return family


def proportional(merges: Merges) -> Family:
    """Every block merges as large a share of all that merge as in a schedule, which is one of the family."""

    def family(tokens: int, prefix: int, depth: int, strength: float) -> Merges:
        """At strength 1 together twice what may merge; always at most half of those that are left to a block."""
        times, found = strength * 2 * (tokens - prefix) / sum(merges), []
        for r in merges:
            found.append(min(round(times * r), max(0, tokens - prefix - sum(found)) // 2))
        return tuple(found)

    return family


FAMILIES: dict[str, Family] = {
    "constant": constant_share,
    "falling": sloped(0.5),
    "uniform": sloped(0.0),
    "rising": sloped(-0.5),
}
"""The less there is to save, the later it may be saved: of DeiT-Ti's work 0.65 goes best by `rising`, 0.5 by `falling`,
0.4 by `constant` (benchmarks/results/tokens_candidates_cpu.csv)."""


def weakest(family: Family, tokens: int, prefix: int, depth: int, enough: Callable[[Merges], bool]) -> Merges | None:
    """The schedule of a family that merges least and is `enough`; None where none is.

    Args:
        enough: whether a schedule costs little enough; true of all stronger ones where it is of one.
    """
    steps = 4 * (tokens - prefix)
    if not enough(family(tokens, prefix, depth, 1.0)):
        return None
    low, high = 0, steps
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(family(tokens, prefix, depth, middle / steps)) else (middle + 1, high)
    return family(tokens, prefix, depth, low / steps)
