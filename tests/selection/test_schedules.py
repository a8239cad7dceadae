"""Schedules of merging: what a family gives, and the least of it that is enough."""

import pytest

from nvit.layers.merging import check_merges, counts, impossible
from nvit.selection.schedules import FAMILIES, constant_share, proportional, sloped, weakest


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(("tokens", "prefix", "depth"), [(197, 1, 12), (198, 2, 12), (17, 1, 3), (5, 5, 2)])
def test_every_strength_can_be_merged_and_more_leaves_less(family, tokens, prefix, depth):
    last = None
    for strength in (0.0, 0.1, 0.4, 0.8, 1.0):
        merges = family(tokens, prefix, depth, strength)
        check_merges(merges, depth, tokens, prefix)
        left = counts(tokens, merges)[-1]
        assert last is None or left <= last
        last = left
    assert family(tokens, prefix, depth, 0.0) == (0,) * depth


def test_families_by_hand():
    assert constant_share(197, 1, 3, 0.5) == (49, 37, 27)  # 196 to 147, 110.25, 82.7
    assert constant_share(9, 1, 3, 1.0) == (4, 2, 1)
    assert sloped(0.0)(197, 1, 12, 16 / 98) == (*(16,) * 11, 10)  # half of the 20 that are left
    assert sloped(0.5)(197, 1, 5, 18 / 98) == (18, 15, 12, 9, 6)
    assert sloped(-0.5)(197, 1, 5, 18 / 98) == (6, 9, 12, 15, 18)
    assert sloped(1.0)(197, 1, 3, 0.5) == (49, 25, 0) and sloped(0.0)(9, 1, 1, 1.0) == (4,)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_weakest_that_is_enough(family):
    def work(merges):
        return sum(counts(197, merges)[:-1])

    merges = weakest(family, 197, 1, 12, lambda m: work(m) <= 0.6 * 12 * 197)
    assert 0.57 * 12 * 197 < work(merges) <= 0.6 * 12 * 197
    assert weakest(family, 197, 1, 12, lambda m: True) == (0,) * 12
    assert weakest(family, 197, 1, 12, lambda m: work(m) < 12) is None


@pytest.mark.parametrize("merges", [(16, 1, 10, 20), (0, 98, 0, 49), (1, 0, 0, 0), (3, 2, 1, 0)])
def test_of_the_schedules_like_one_it_is_the_weakest_that_merges_as_many(merges):
    """A search ends on a schedule; what corrects its latency has to begin there."""
    like = proportional(merges)
    assert impossible(merges, 197, 1) is None
    assert weakest(like, 197, 1, 4, lambda m: sum(m) >= sum(merges)) == merges
    strongest = like(197, 1, 4, 1.0)
    check_merges(strongest, 4, 197, 1)
    assert sum(strongest) > sum(merges) or sum(merges) > 140, strongest
    assert all(r == 0 for r, asked in zip(strongest, merges, strict=True) if not asked)


def test_valid_is_what_a_model_takes():
    assert impossible((98, 49, 24), 197, 1) is None
    assert impossible((99, 0, 0), 197, 1) == 0 and impossible((98, 50, 0), 197, 1) == 1
    assert impossible((5, -1, 0), 197, 1) == 1
