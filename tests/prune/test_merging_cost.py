"""What merging takes: few models are timed, and what they say holds for schedules of every family."""

import numpy as np
import pytest

from nvit import adapters
from nvit.latency.spread import Ratio
from nvit.prune.merging_cost import SHARES, MergingCost, Rung, measure_merging
from nvit.prune.tokens import work_of
from nvit.selection.schedules import FAMILIES
from nvit.structure.compact import compact
from nvit.structure.masks import full_masks
from tests.hosts import make, random_masks


def extra(share):
    """What the clock adds: most at half of the work."""
    return 0.4 * share * (1 - share)


def measured(dense):
    """What merging takes by a clock that adds `extra`, and the merges that it timed."""
    work, timed = work_of(dense), []

    def ratios(models, rough):
        assert rough, "what wins is measured itself"
        timed.extend(map(adapters.merges, models))
        shares = [work(merges) / work(()) for merges in timed]
        return [Ratio(share + extra(share), 0.0) for share in shares]

    return measure_merging(dense, ratios), timed


def test_one_model_is_timed_at_each_share_and_the_dense_one_stays():
    dense = make("plain", img_size=32, depth=12)
    cost, timed = measured(dense)
    assert len(timed) == len(SHARES) and not any(adapters.merges(dense))
    assert cost.shares == tuple(sorted(cost.shares)) and cost.of(1.0) == 0.0
    for share, most in zip(cost.shares, sorted(SHARES), strict=False):
        assert most - 0.1 < share <= most
        assert cost.of(share) == pytest.approx(extra(share))
    assert measure_merging(dense, None) == MergingCost() and MergingCost().of(0.4) == 0.0


def test_vague_readings_are_told_by_what_they_have_in_common():
    """The dense model's noise is in all of them, in proportion to what each takes."""
    dense, noise = make("plain", img_size=32, depth=12), np.random.default_rng(0)
    errors = []

    def ratios(models, rough):
        work = work_of(dense)
        times = [work(adapters.merges(m)) / work(()) + 0.08 for m in models] * (
            1 + 0.05 * noise.normal(size=len(models))
        )
        return [Ratio(t, 2 * 0.05 * 2**0.5 * t) for t in times / (1 + 0.05 * noise.normal())]

    for _ in range(30):
        cost = measure_merging(dense, ratios)
        assert min(cost.extra) >= 0 and cost.of(1.0) == 0
        errors.append(np.array(cost.extra[:-1]) - 0.08)
    alone = 0.05 * 2**0.5 * (np.array(cost.shares[:-1]) + 0.08)
    assert (np.sqrt(np.square(errors).mean(0)) < [1.0, 0.75, 0.6] * alone).all()


def test_merging_never_gains_more_than_the_work_that_it_saves():
    cost = measure_merging(
        make("plain", img_size=32, depth=12), lambda models, rough: [Ratio(0.1, 0.2) for _ in models]
    )
    assert len(cost.extra) == len(SHARES) + 1 and set(cost.extra) == {0.0}


def test_what_was_timed_foretells_all_families_and_narrower_models():
    dense = adapters.merge_(make("plain", img_size=32, depth=12), ())
    cost, work = measured(dense)[0], work_of(dense)
    groups = adapters.find(dense).groups(dense)
    for masks in (full_masks(groups), random_masks(groups, 0.8)):
        small = compact(dense, groups, masks)
        rung = Rung(small, work_of(small)(()) / work(()), cost, work)
        found = rung.schedules(0.6 * rung.ratio + 0.1)
        assert set(found) == set(FAMILIES)
        for merges in found.values():
            share = work(merges) / work(())
            told = work_of(small)(merges) / work(()) + extra(share)
            assert rung.predicted(merges) == pytest.approx(told, abs=0.02) and rung.predicted(()) == rung.ratio
