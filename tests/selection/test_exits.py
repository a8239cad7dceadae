"""Sublayers that leave whole, against trying every choice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvit.selection.curves import Curve, priced, whole_costs
from nvit.selection.decision import Decision
from nvit.selection.descent import Descent
from nvit.selection.lagrangian import drop_to_target
from nvit.spec import Group
from nvit.structure.masks import check_masks, full_masks, widths
from tests.tables import VIT, groups_of, table_of, with_noise

BUNDLES = {"emb": 4, "heads": 2, "qk_dim": 2, "v_dim": 2, "mlp": 3}


def ending(groups):
    """The groups with attention and MLP of every block allowed to leave."""
    ends = {"heads": ("qk_dim", "v_dim"), "mlp": ()}
    named = {g.name: tuple(f"{g.name.rpartition('.')[0]}.{kind}" for kind in ends.get(g.kind, ())) for g in groups}
    return [replace(g, ends=named[g.name]) if g.kind in ends else g for g in groups]


def case(seed: int, dear: float = 1.0):
    """Groups, scores and what it costs that each sublayer leaves: `dear` times what its queues can lose, about."""
    groups, rng = ending(groups_of(VIT, BUNDLES)), np.random.default_rng(seed)
    scores = {g.name: torch.from_numpy(rng.exponential(size=g.size)) for g in groups}
    ends = {g.name: float(dear * scores[g.name].sum() * rng.uniform(0.2, 1)) for g in groups if g.ends is not None}
    return groups, scores, ends


def objective(decision: Decision, gone, eta: float) -> float:
    """Saliency lost and the price of latency, added up one by one."""
    for i, k in enumerate(gone):
        decision.set_gone(i, int(k))
    left = [way for i, way in decision.exits.items() if decision.has_left(i)]
    void = {int(m) for way in left for m in way.members}
    lost = sum(q.lost[decision.gone[i]] for i, q in enumerate(decision.queues) if i not in void)
    return lost + sum(way.cost for way in left) + eta * decision.latency_ms() / decision.table.dense_ms


@settings(max_examples=20)
@given(st.integers(0, 99), st.sampled_from([0.2, 1.0, 2.0]), st.sampled_from([0.0, 3.0, 10.0, 1e3]))
def test_at_a_price_no_choice_alone_gains_and_no_sublayer_by_leaving_or_staying(seed, dear, eta):
    groups, scores, ends = case(seed, dear)
    decision = Decision(scores, full_masks(groups), groups, with_noise(table_of(VIT), seed), ends)
    gone, ms = Descent(decision).at(eta)
    best = objective(decision, gone, eta)
    assert ms == pytest.approx(decision.latency_ms(), rel=1e-12)
    for i, q in enumerate(decision.queues):
        for k in range(len(q.left) + (i in decision.exits)):
            other = gone.copy()
            other[i] = k
            assert best <= objective(decision, other, eta) + 1e-9 * max(1.0, eta), (q.group.name, k)


@settings(max_examples=20)
@given(st.integers(0, 99), st.floats(0.02, 0.9))
def test_a_target_is_met_and_what_leaves_leaves_with_all_that_ends_with_it(seed, target):
    groups, scores, ends = case(seed)
    table, full = table_of(VIT), full_masks(groups)
    masks, _ = drop_to_target(scores, full, groups, table, max(target, 0.05) * table.dense_ms, ends)
    assert table.model_ms(widths(groups, masks)) <= max(target, 0.05) * table.dense_ms
    check_masks(groups, masks)
    again, _ = drop_to_target(
        scores, masks, groups, table, 0.05 * table.dense_ms, {n: c for n, c in ends.items() if masks[n].any()}
    )
    assert all(not (again[n] & ~masks[n]).any() for n in masks), "a pruned unit came back"
    check_masks(groups, again)


def test_the_step_from_one_bundle_to_none_saves_the_whole_sublayer():
    groups, scores, _ = case(0)
    ends = {"blocks.1.mlp": 7.0, "blocks.0.heads": 2.0}
    table = table_of(VIT)
    decision = Decision(scores, full_masks(groups), groups, table, ends)
    at = {q.group.name: i for i, q in enumerate(decision.queues)}
    for name in ("blocks.0.heads", "blocks.0.qk_dim", "blocks.1.mlp"):
        decision.set_gone(at[name], int(decision.last[at[name]]))
    lost = {name: decision.queues[i].lost[decision.gone[i]] for name, i in at.items()}
    before, saliency, saved = decision.latency_ms(), decision.saliency(), decision.latency_saved()
    for name, members in (("blocks.0.heads", ("heads", "qk_dim", "v_dim")), ("blocks.1.mlp", ("mlp",))):
        block = name.rpartition(".")[0]
        assert saliency[at[name]] == pytest.approx(ends[name] - sum(lost[f"{block}.{kind}"] for kind in members))
        decision.drop(at[name])
        assert before - decision.latency_ms() == pytest.approx(saved[at[name]] * table.dense_ms)
        before = decision.latency_ms()
        assert not np.isfinite(decision.saliency()[[at[f"{block}.{kind}"] for kind in members]]).any()
    masks = decision.masks()
    assert [n for n, keep in masks.items() if not keep.any()] == [
        "blocks.0.heads", "blocks.0.qk_dim", "blocks.0.v_dim", "blocks.1.mlp"
    ]  # fmt: skip
    assert decision.latency_saved()[[at["blocks.0.v_dim"], at["blocks.1.mlp"]]].tolist() == [0, 0]


def test_the_cost_of_all_of_a_group_does_not_make_a_part_of_it_cheaper():
    group = Group("blocks.0.mlp", "mlp", 8, 2, (), (0,), ends=())
    score, keep = torch.ones(8, dtype=torch.float64), torch.ones(8, dtype=torch.bool)
    curve = Curve((4, 8), (4.0, 4.5))
    found = priced(group, score, keep, curve).sort().values.cumsum(0)
    assert found[[3, 5]].tolist() == pytest.approx([4.0, 6.0])
    assert torch.equal(priced(group, score, keep, Curve((8,), (4.5,))), score)
    assert whole_costs([group], {group.name: keep}, {group.name: curve}) == {group.name: 4.5}
    keep[:4] = False
    assert whole_costs([group], {group.name: keep}, {group.name: curve}) == {group.name: 0.5}
