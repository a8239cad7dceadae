"""Schedules that blocks exchange: what is dear is avoided, what is not enough never seen, chance not followed."""

import pytest

from nvit.layers.merging import check_merges, counts
from nvit.selection.exchange import exchange

START = (8,) * 12
LEAST = sum(counts(197, START)[1:])


def enough(merges):
    check_merges(merges, 12, 197, 1)
    return sum(counts(197, merges)[1:]) <= LEAST


def by_price(*prices):
    return lambda merges, _=None: sum(p * r * r for p, r in zip(prices, merges, strict=True))


def found(*tests, tries=200, start=START):
    return exchange(start, 197, 1, enough, tests, tries)


def test_a_dear_block_hands_its_merges_on():
    dear = by_price(1, 50, *(1,) * 10)
    merges = found(dear)
    assert enough(merges) and merges[1] == 0
    assert dear(merges) < 0.4 * dear(START)


def test_every_test_has_to_fall():
    """Two that want opposite things keep the schedule, whichever is asked first."""
    first, last = (lambda m, _: -m[0]), (lambda m, _: m[0])
    assert found(first) != START
    assert found(first, last) == found(last, first) == START


def test_a_move_that_fails_the_first_test_is_not_shown_to_the_second():
    seen = []
    found(lambda m, _: float(m != START), lambda m, _: seen.append(m) or 0.0)
    assert seen == [START]


def test_what_is_not_nearer_may_be_told_as_infinite():
    """Compared with the best so far, whose distance was told before."""
    dear, known = by_price(1, 50, *(1,) * 10), {}

    def raced(merges, beside):
        assert beside is None or beside in known
        known[merges] = dear(merges)
        return known[merges] if beside is None or known[merges] < known[beside] else float("inf")

    assert found(raced) == found(dear)


@pytest.mark.parametrize("tries", [0, 1, 7])
def test_no_more_schedules_are_looked_at_than_may(tries):
    seen = []
    merges = found(lambda m, _: seen.append(m) or -len(seen), tries=tries)
    assert len(seen) == 1 + tries and len(set(seen)) == len(seen)
    assert merges == seen[-1]


def test_few_tokens_move_one_by_one_and_none_stay():
    work = sum(counts(9, (1, 1, 1))[1:])
    few = lambda m: sum(counts(9, m)[1:]) <= work  # noqa: E731
    assert exchange((1, 1, 1), 9, 1, few, [by_price(9, 1, 1)], 50)[0] == 0
    assert exchange((0, 0), 1, 1, lambda m: True, [by_price(1, 1)], 50) == (0, 0)
