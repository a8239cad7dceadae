"""Curves of measured costs: convex, through what was measured, and what they make of scores."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvit.selection.bundles import queue_of, units_gone
from nvit.selection.curves import Curve, convex_hull, depths, priced
from nvit.selection.lagrangian import drop_to_target
from nvit.spec import Group, block_widths
from nvit.structure.masks import full_masks, widths
from tests.tables import VIT, groups_of, table_of

BUNDLES = {"emb": 4, "heads": 1, "qk_dim": 2, "v_dim": 2, "mlp": 3}


@st.composite
def measured(draw):
    """A group, scores of its units, and a curve with noise."""
    size, multiple = draw(st.integers(2, 40)), draw(st.integers(1, 7))
    group = Group("g", "mlp", size, multiple, (), (0,))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    score = torch.from_numpy(rng.exponential(size=size) * (rng.random(size) > draw(st.sampled_from([0.0, 0.5, 1.0]))))
    gone = depths(size, multiple, draw(st.sampled_from([(0.5,), (0.25, 0.5, 0.75), (0.1, 0.2, 0.9, 0.95)])))
    if not gone:
        gone = [size]
    cost = rng.normal(0.5, 1.0, len(gone)) * 10.0 ** draw(st.integers(-6, 3))
    return group, score, Curve(tuple(gone), tuple(cost))


@given(measured())
def test_a_curve_starts_at_nothing_never_falls_and_goes_through_what_was_measured(case):
    group, score, curve = case
    cost = curve.at(np.r_[0.0, score.sort().values.cumsum(0)])
    assert len(cost) == group.size + 1 and cost[0] == 0
    assert (np.diff(cost) >= -1e-12 * cost.max()).all()
    highest = np.maximum.accumulate(np.r_[0.0, curve.cost])[1:]
    np.testing.assert_allclose(cost[list(curve.gone)], highest, rtol=1e-9)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9), st.data())
def test_hull_is_the_greatest_convex_function_below(ys, data):
    steps = data.draw(st.lists(st.integers(1, 5), min_size=len(ys), max_size=len(ys)))
    x, y = np.cumsum(steps), np.array(ys)
    hull = convex_hull(x, y)

    def below(j):
        """The lowest chord over a point."""
        chords = [
            y[i] if i == k else y[i] + (y[k] - y[i]) * (x[j] - x[i]) / (x[k] - x[i])
            for i in range(j + 1)
            for k in range(j, len(x))
        ]
        return min(chords)

    np.testing.assert_allclose(hull, [below(j) for j in range(len(x))], atol=1e-9)


@given(measured())
def test_priced_units_keep_their_order_and_their_bundles_cost_the_curve(case):
    group, score, curve = case
    full = torch.ones(group.size, dtype=torch.bool)
    new = priced(group, score, full, curve)
    assert torch.equal(new.argsort(stable=True), score.argsort(stable=True))
    assert (new >= 0).all() and new.isfinite().all()
    ends = np.r_[units_gone(group.size, group.multiple), group.size]
    hull = convex_hull(ends, curve.at(np.r_[0.0, score.sort().values.cumsum(0)])[ends])
    lost = queue_of(group, new, full).lost
    np.testing.assert_allclose(lost, hull[: len(lost)], rtol=1e-6, atol=1e-9 * max(1e-9, hull[-1]))


@settings(max_examples=30)
@given(measured(), st.integers(1, 20), st.integers(0, 99))
def test_what_left_before_does_not_make_the_rest_cheaper(case, before, seed):
    group, score, curve = case
    before = min(before, group.size - 1)
    keep = torch.ones(group.size, dtype=torch.bool)
    keep[torch.randperm(group.size, generator=torch.Generator().manual_seed(seed))[:before]] = False
    new = priced(group, score, keep, curve)
    assert new[~keep].isinf().all() and new[keep].isfinite().all()
    deepest = [(g, c) for g, c in zip(curve.gone, np.maximum.accumulate((0.0, *curve.cost))[1:], strict=True)]
    behind = [g for g, _ in deepest if g > before]
    if behind:  # to the depths that were measured, the rest costs no more than the whole curve
        k = behind[-1] - before
        total = float(new[keep].sort().values[:k].sum())
        assert total <= deepest[-1][1] * (1 + 1e-6) + 1e-9


def test_equal_slopes_leave_in_the_order_of_the_scores():
    group = Group("g", "mlp", 6, 1, (), (0,))
    score = torch.tensor([5.0, 1.0, 4.0, 2.0, 6.0, 3.0])
    new = priced(group, score, torch.ones(6, dtype=torch.bool), Curve((6,), (0.0,)))
    assert torch.equal(new.argsort(stable=True), score.argsort(stable=True))


def test_depths_are_whole_bundles_each_once():
    assert depths(64, 8, (0.25, 0.5, 0.75)) == [16, 32, 48]
    assert depths(3, 2, (0.25, 0.5, 0.75)) == [1]  # three heads become two, and no fewer
    assert depths(2, 2, (0.5,)) == []


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_by_curves_equals_trying_all_widths(seed):
    """Heads and hidden units of two blocks: no choice that is as fast costs less, a bundle apart."""
    groups = [g for g in groups_of(VIT, BUNDLES) if g.kind in ("mlp", "v_dim")]
    every, table, rng = groups_of(VIT, BUNDLES), table_of(VIT), np.random.default_rng(seed)
    full = full_masks(every)
    scores = {}
    for g in groups:
        gone = depths(g.size, g.multiple, (0.25, 0.5, 0.75))
        curve = Curve(tuple(gone), tuple(np.cumsum(rng.exponential(size=len(gone)))))
        scores[g.name] = priced(g, torch.from_numpy(rng.exponential(size=g.size)), full[g.name], curve)
    lost = {g.name: queue_of(g, scores[g.name], full[g.name]) for g in groups}
    tries = []
    for choice in product(*(range(len(lost[g.name].left)) for g in groups)):
        counts = {g.name: g.size for g in every}
        counts |= {g.name: int(lost[g.name].left[k]) for g, k in zip(groups, choice, strict=True)}
        cost = sum(lost[g.name].lost[k] for g, k in zip(groups, choice, strict=True))
        tries.append((table.model_ms(block_widths(every, counts)), cost))
    reach = min(ms for ms, _ in tries) / table.dense_ms
    bundle = max(float(np.diff(q.lost).max()) for q in lost.values())
    for share in (0.2, 0.5, 0.8):
        target = table.dense_ms * (reach + share * (1 - reach))
        found, _ = drop_to_target(scores, full, every, table, target)
        assert table.model_ms(widths(every, found)) <= target
        cost = sum(float(scores[g.name][~found[g.name]].sum()) for g in groups)
        assert cost <= min(c for ms, c in tries if ms <= target) + bundle
