"""How many tokens merge in each block: families with one parameter, since costs of merging do not add up over blocks.

Of a constant share, every block passes on the same share of the tokens that may merge, so that most leave early and few
late; uniform, every block merges as many.
"""

from __future__ import annotations

from collections.abc import Callable

Merges = tuple[int, ...]
Family = Callable[[int, int, int, float], Merges]


def constant_share(tokens: int, prefix: int, depth: int, strength: float) -> Merges:
    """Every block passes on the same share of the tokens that may merge.

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


def uniform(tokens: int, prefix: int, depth: int, strength: float) -> Merges:
    """Every block merges as many, at strength 1 so many that none would be left after the last; at most half of what is
    there."""
    wanted, found = strength * (tokens - prefix) / depth, []
    for i in range(depth):
        whole = tokens - prefix - sum(found)
        found.append(min(round(wanted * (i + 1)) - round(wanted * i), whole // 2))
    return tuple(found)


FAMILIES: dict[str, Family] = {"constant": constant_share, "uniform": uniform}


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
