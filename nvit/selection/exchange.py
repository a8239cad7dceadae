"""Schedules no family has: blocks hand merges on to their neighbours for as long as answers come nearer.

How dear merging is differs from block to block by more than any smooth family follows, and a block's own cost does not
say it, since costs of merging do not add up.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from ..layers.merging import impossible
from .schedules import Merges

Distance = Callable[[Merges, Merges | None], float]
"""By a schedule, and one whose distance is known: what is not nearer than that may be told as infinite."""


def exchange(
    start: Merges, tokens: int, prefix: int, enough: Callable[[Merges], bool], tests: Sequence[Distance], tries: int
) -> Merges:
    """From a schedule to a nearer one that is `enough`, by moves between two neighbouring blocks: one merges a step
    more or fewer, and the other as few as are enough. A move is taken where every test falls.

    Args:
        tokens: that enter the first block, of which `prefix` never merge.
        enough: as in `schedules.weakest`.
        tests: distances, on images of their own; most moves fail the first.
        tries: schedules that are looked at, at most.
    """
    best, distances, seen = start, [test(start, None) for test in tests], {start}
    step = max(1, (tokens - prefix) // 24)
    while step:
        before = best
        for block, beside, more in _moves(len(start), step):
            moved = _moved(best, block, beside, more, tokens, prefix, enough)
            if moved is None or moved in seen:
                continue
            if len(seen) > tries:
                return best
            seen.add(moved)
            nearer = _all_nearer(moved, best, tests, distances)
            best, distances = (moved, nearer) if nearer else (best, distances)
        step = step if best != before else step // 2
    return best


def _moves(blocks: int, step: int) -> list[tuple[int, int, int]]:
    return [
        (block, beside, more)
        for block in range(blocks)
        for beside in (block + 1, block - 1)
        if 0 <= beside < blocks
        for more in (step, -step)
    ]


def _moved(
    merges: Merges, block: int, beside: int, more: int, tokens: int, prefix: int, enough: Callable[[Merges], bool]
) -> Merges | None:
    """One block merges so many more, and the one beside it as few as are enough; None where none are."""

    def with_(r: int) -> Merges:
        found = list(merges)
        found[block], found[beside] = found[block] + more, r
        return tuple(found)

    may = [r for r in range(sum(merges) + 1) if impossible(with_(r), tokens, prefix) is None]
    few = bisect_left(may, True, key=lambda r: enough(with_(r)))
    return with_(may[few]) if few < len(may) else None


def _all_nearer(merges: Merges, best: Merges, tests: Sequence[Distance], than: Sequence[float]) -> list[float]:
    """Distances by every test; none where one is not nearer than the best schedule's."""
    found: list[float] = []
    for test, distance in zip(tests, than, strict=True):
        found.append(test(merges, best))
        if found[-1] >= distance:
            return []
    return found
