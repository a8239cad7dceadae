"""Closed-form refits against least squares in fp64, and what a refit promises on every kind of model."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nvit import LatencyTable, PruneConfig, adapters, prune
from nvit.calibration.gauss_newton import GateProducts
from nvit.calibration.replay import Replay
from nvit.calibration.statistics import gather_statistics
from nvit.criteria.curvature import curvature_loss
from nvit.criteria.elimination import eliminate
from nvit.criteria.gates import GateRecorder
from nvit.criteria.remaining import remaining_loss
from nvit.criteria.turns import leave_in_turn
from nvit.layers import Attention, prunable_layers
from nvit.refit.entries import entries
from nvit.refit.refit import refit_
from nvit.refit.ridge import Moments, ridge
from nvit.refit.rotation import balanced, rotate_
from nvit.structure.compact import compact
from nvit.structure.masks import apply_, full_masks
from nvit.tasks.classification import Classification
from tests.hosts import TINY_HOSTS, images, prepared, random_masks
from tests.runs import arguments

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def moments(x, r, targets=None, weights=None) -> Moments:
    found = Moments.empty(x.shape[1], r.shape[1])
    half = len(x) // 2
    for rows in (slice(None, half), slice(half, None)):
        found.add(
            x[rows], r[rows], (r if targets is None else targets)[rows], None if weights is None else weights[rows]
        )
    return found


def batches(model, count=4, size=6):
    return [images(model, size, seed=s) for s in range(count)]


def lone(host, dtype=torch.float32, **more):
    """A prepared model, a copy of it as it is, and its groups."""
    model, groups = prepared(host, dtype, **more)
    return model, copy.deepcopy(model), groups


def logits(model, xs):
    with torch.no_grad():
        return torch.cat(
            [torch.cat([t for t in adapters.find(model).logits(model, x) if t is not None], -1) for x in xs]
        )


@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_without_penalty_is_least_squares(weighted):
    x, true = draw(400, 7) + 2, draw(3, 7, seed=1)
    r = x @ true.T + 5 + 0.1 * draw(400, 3, seed=2)
    w = draw(400, seed=3).abs() if weighted else None
    root = torch.ones(400, 1, dtype=F64) if w is None else w.sqrt()[:, None]
    both = moments(x, r, weights=w)
    change = ridge(
        moments(x[:300], r[:300], weights=None if w is None else w[:300]),
        moments(x[300:], r[300:], weights=None if w is None else w[300:]),
        ridges=(1e-14,),
    )
    exact = torch.linalg.lstsq(root * torch.cat([x, torch.ones(400, 1, dtype=F64)], 1), root * r).solution.T
    torch.testing.assert_close(torch.cat([change.weight, change.bias[:, None]], 1), exact, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(both.weight, both.weight.new_tensor(400.0) if w is None else w.sum())


def test_ridge_at_one_strength_solves_its_normal_equations():
    x, r = draw(60, 9), draw(60, 4, seed=1) + draw(60, 9) @ draw(9, 4, seed=2)
    a, b = moments(x[:40], r[:40]), moments(x[40:], r[40:])
    change = ridge(a, b, ridges=(0.1,))
    c, rx, _, mx, mr = (a + b).centred()
    scale = 0.1 * float(a.centred()[0].diagonal().mean())
    took = change.weight.abs().sum(1) > 0
    exact = torch.linalg.solve(c + scale * torch.eye(9, dtype=F64), rx.T).T
    assert took.any()
    torch.testing.assert_close(change.weight[took], exact[took], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(change.bias[took], (mr - exact @ mx)[took], rtol=1e-9, atol=1e-12)


def test_held_back_error_is_the_one_of_the_change_fitted_on_the_rest_and_never_grows():
    x, r = draw(30, 20), draw(30, 5, seed=1)  # nothing to learn, and more inputs than it can bear
    a, b = moments(x[:22], r[:22]), moments(x[22:], r[22:])
    change = ridge(a, b)
    before = float(r[22:].square().sum(1).mean())
    assert change is None or (change.after <= change.before and change.before == pytest.approx(before))
    only = ridge(a, b, ridges=(1.0,), constant=False)
    xx = x[:22].T @ x[:22] / 22
    d = torch.linalg.solve(xx + float(xx.diagonal().mean()) * torch.eye(20, dtype=F64), x[:22].T @ r[:22] / 22).T
    errors = (r[22:] - x[22:] @ d.T).square().mean(0)
    exact = torch.minimum(errors, r[22:].square().mean(0)).sum()
    assert (before if only is None else only.after) == pytest.approx(float(exact))


def test_nothing_lacking_changes_nothing():
    x, t = draw(50, 6), draw(50, 3, seed=1)
    assert ridge(moments(x[:40], 1e-7 * t[:40], t[:40]), moments(x[40:], 1e-7 * t[40:], t[40:])) is None


@pytest.mark.parametrize("case", ["one row", "same rows", "constant input", "zero input"])
def test_singular_moments_give_finite_changes(case):
    x = {"one row": draw(1, 8), "same rows": draw(1, 8).repeat(40, 1), "zero input": torch.zeros(40, 8, dtype=F64)}.get(
        case, torch.ones(40, 8, dtype=F64)
    )
    r = draw(len(x), 3, seed=1) if case != "same rows" else draw(1, 3, seed=1).repeat(40, 1)
    change = ridge(moments(x, r), moments(x, r))
    if change is not None:
        assert change.weight.isfinite().all() and change.bias.isfinite().all()
        assert float(change.weight.abs().max()) < 16 * float(r.abs().max()) / float(x.std().clamp_min(0.1))


def test_probe_has_the_curvature_of_cross_entropy():
    z = draw(1, 5).requires_grad_()
    exact = torch.autograd.functional.hessian(lambda t: cross_entropy(t, torch.tensor([2])), z)[0, :, 0]
    g = torch.Generator().manual_seed(0)
    drawn = Classification(10).probe(z.detach().expand(40_000, -1), g)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), exact, rtol=0, atol=0.01)


def test_elimination_costs_are_those_of_the_best_linear_prediction():
    """A unit's cost is the curvature of what the kept ones leave unexplained of it, for single dims and for blocks."""
    for dims in (torch.arange(6)[:, None], torch.arange(6).view(2, 3).T):
        c, g = (m @ m.T + 0.1 * torch.eye(6, dtype=F64) for m in (draw(6, 6), draw(6, 6, seed=1)))
        costs = eliminate([(c, g, dims)], len(dims), ridge=0.0)
        order = costs.argsort(stable=True)

        def loss(gone, dims=dims, c=c, g=g):
            s = dims[gone].flatten()
            k = torch.tensor([i for i in range(6) if i not in s.tolist()])
            left = c[s][:, s] - c[s][:, k] @ torch.linalg.inv(c[k][:, k]) @ c[k][:, s]
            # What the kept dims cannot say is all that is lost: the change lives on the dims that left.
            return float((g[s][:, s] * left).sum())

        first = min(loss(torch.tensor([u])) for u in range(len(dims)))
        assert float(costs.min()) == pytest.approx(first, rel=1e-9)
        assert float(costs[order[0]]) == pytest.approx(loss(order[:1]), rel=1e-9)


def test_balanced_basis_makes_both_moments_diagonal_and_alike():
    c, g = (m @ m.mT for m in (draw(3, 8, 8), draw(3, 8, 8, seed=1)))
    r, inverse = balanced(c, g)
    turned, curved = r @ c @ r.mT, inverse.mT @ g @ inverse
    torch.testing.assert_close(r @ inverse, torch.eye(8, dtype=F64).expand(3, 8, 8))
    torch.testing.assert_close(turned, curved, rtol=1e-6, atol=1e-6)
    diagonal = turned.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(turned, torch.diag_embed(diagonal), rtol=0, atol=1e-6)
    assert (diagonal.diff(dim=1) <= 1e-9).all()


@pytest.mark.parametrize("host", TINY_HOSTS)
def test_rotation_changes_no_output(host):
    model, dense, _ = lone(host, F64)
    xs = batches(model, 2)
    left = rotate_(model, gather_statistics(model, xs))
    torch.testing.assert_close(logits(model, xs), logits(dense, xs), rtol=0, atol=1e-10)
    assert bool(left) == ("qk_norm" in host)
    moved = (model.blocks[0].attn.qkv.weight - dense.blocks[0].attn.qkv.weight).detach().abs().max()
    assert float(moved) > 1e-3


def test_what_was_seen_turns_with_the_model():
    model, _, _ = lone("plain", F64)
    xs = batches(model, 2)
    statistics = gather_statistics(model, xs)
    rotate_(model, statistics)
    again = gather_statistics(model, xs)
    for place in (("blocks.0.attn", "out"), ("blocks.1.attn", "qk")):
        for field in ("x", "xx", "gg"):
            a, b = getattr(statistics[place], field), getattr(again[place], field)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float(b.abs().max()))  # rows are multiplied in fp32


@pytest.mark.parametrize("host", ["plain", "deit3", "qk_norm_no_bias"])
def test_entries_find_how_layers_enter_the_stream(host):
    model, _, _ = lone(host, F64)
    replay = Replay(model)
    with torch.no_grad():
        replay.enter(images(model, 2))
        found = entries(replay, {n: m for n, m in prunable_layers(model).items() if n.startswith("blocks.0.")})
    block = model.blocks[0]
    for layer, norm, scale in (("attn", "norm1", block.ls1), ("mlp", "norm2", block.ls2)):
        entry = found[f"blocks.0.{layer}"]
        exact = getattr(scale, "gamma", torch.ones(48, dtype=F64))
        assert entry.norm == f"blocks.0.{norm}"
        torch.testing.assert_close(entry.gain, exact.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("host", TINY_HOSTS)
def test_refit_helps_keeps_zeros_and_changes_nothing_where_nothing_left(host):
    model, dense, groups = lone(host)
    xs = batches(model)
    statistics = gather_statistics(model, xs)
    refit_(model, dense, groups, xs, statistics=statistics)
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert float((p - q).abs().max()) <= 1e-6, name
    masks = random_masks(groups, 0.7)
    apply_(model, groups, masks)
    rows = refit_(model, dense, groups, xs, statistics=statistics)
    assert all(r["after"] <= r["before"] for r in rows) and any(r["after"] < 0.95 * r["before"] for r in rows)
    with torch.no_grad():
        small, whole = logits(compact(model, groups, masks), xs), logits(model, xs)
    torch.testing.assert_close(small, whole, rtol=0, atol=1e-5 * max(1.0, float(whole.abs().max())))
    refitted = {n: p.clone() for n, p in model.named_parameters()}
    apply_(model, groups, masks)
    assert all(torch.equal(p, refitted[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["mlp", "v_dim", "heads", "qk_dim", "emb"])
def test_refit_brings_hidden_states_nearer_whatever_left(kind):
    """On the images it was fitted to, plain rows: what the last block gives to the final norm."""
    model, dense, groups = lone("three_blocks", F64)
    xs = batches(model, 8, 16)
    masks = full_masks(groups) | {g.name: m for g in groups if g.kind == kind for m in [random_masks([g], 0.6)[g.name]]}

    def tokens(m):
        found = []
        hook = m.norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        logits(m, xs)
        hook.remove()
        return torch.cat(found)

    apply_(model, groups, masks)
    keep, exact = masks["emb"], tokens(dense)
    before = float((tokens(model) - exact[..., keep]).square().mean())
    refit_(model, dense, groups, xs)
    assert float((tokens(model) - exact[..., keep]).square().mean()) < before


@pytest.mark.parametrize("case", ["one image", "same image"])
def test_few_or_equal_images_do_not_blow_up(case):
    model, dense, groups = lone("plain")
    x = images(model, 1)
    xs = [x, x] if case == "one image" else [x.repeat(4, 1, 1, 1)] * 3
    masks = random_masks(groups, 0.6)
    apply_(model, groups, masks)
    refit_(model, dense, groups, xs, statistics=gather_statistics(dense, xs))
    biggest = max(float(p.abs().max()) for p in dense.parameters())
    assert all(p.isfinite().all() and float(p.abs().max()) < 16 * biggest for p in model.parameters())


@pytest.mark.parametrize("layout", ["plain", "half", "interleaved"])
@pytest.mark.parametrize("windows", [(), (3,)])
def test_rows_of_queries_hold_all_heads_units_last(layout, windows):
    heads, tokens, units = 2, 4, 5
    shape, axis = {"plain": ((units,), -1), "half": ((2, units), -1), "interleaved": ((units, 2), -2)}[layout]
    x = draw(2, *windows, heads, tokens, *shape)
    host = nn.Module()
    host.qkv, host.proj = nn.Linear(8, 8), nn.Linear(8, 8)
    sizes = {"heads": heads, "qk_dim": units, "v_dim": 4}
    site = Attention(host, **sizes, scale=1.0, pairs=None if layout == "plain" else layout).sites()["qk"]
    assert site.axes == {"qk_dim": axis}
    rows = site.rows(x)
    per_image = tokens * (windows or (1,))[0]
    assert rows.shape == (2 * per_image, heads * len(shape) * units)
    first = x[(0,) * (1 + len(windows))][:, 0].movedim(axis, -1)  # heads' dims of the first token
    assert torch.equal(rows[0], first.flatten())


def test_one_batch_is_refused():
    model, dense, groups = lone("plain")
    with pytest.raises(ValueError, match="it needs 2"):
        refit_(model, dense, groups, batches(model, 1))


def test_gathering_leaves_no_trace_and_reads_no_labels():
    model, dense, groups = lone("deit_distilled")
    model.blocks[0].mlp.fc1.weight.requires_grad_(False)
    statistics = gather_statistics(model, batches(model, 2))
    assert not any(m._watches or m._forward_pre_hooks or m._forward_hooks for m in prunable_layers(model).values())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
    scores = remaining_loss(model, groups, full_masks(groups), statistics)
    assert {n: len(s) for n, s in scores.items()} == {g.name: g.size for g in groups}
    assert all(s.isfinite().all() and (s >= 0).all() for s in scores.values())


@pytest.mark.parametrize("host", ["plain", "deit_distilled", "swiglu", "qk_norm_no_bias"])
def test_gate_products_are_those_of_recorded_gates(host):
    """Dim by dim at each place, summed to units, against per-image gates of the same probes; pruned models too."""
    model, _, groups = lone(host)
    masks = random_masks(groups, 0)
    apply_(model, groups, masks)
    x, gates = images(model, 6), GateProducts()
    statistics = gather_statistics(model, [x], gates=gates, seed=3)
    with GateRecorder(model, groups, masks) as recorder:
        cls, dist = adapters.find(model).logits(model, x)
        z = cls if dist is None else (cls + dist) / 2
        z.backward(Classification(10).probe(z, torch.Generator().manual_seed(3)))
    recorded = recorder.pop()
    scores = curvature_loss(model, groups, masks, statistics, gates)
    for g in groups:
        kept = masks[g.name]
        assert bool((scores[g.name][~kept] == 0).all()) and bool((scores[g.name][kept] > 0).all())
        sampled = recorded[g.name][:, kept].double()
        # What a group's sample says of it is half of its curvature; the order starts with the least of the diagonal.
        products = _pairs_of_tokens(model, g, statistics, int(kept.sum()))
        total = (sampled.T @ sampled / 6 + products) / 2
        torch.testing.assert_close(scores[g.name][kept], leave_in_turn(total), rtol=2e-3, atol=1e-9)


def _pairs_of_tokens(model, group, statistics, units):
    """E x x' · Σ_tokens E g g', unit by unit."""
    total = torch.zeros(units, units, dtype=F64)
    for name, layer in prunable_layers(model).items():
        for axis, owner in layer.axes.items():
            place = (name, {"emb": "emb", "qk_dim": "qk"}.get(axis, "out"))
            if owner != group.name or place not in statistics:
                continue
            s = statistics[place]
            every = s.xx / s.rows * (s.gg / s.images)
            d = len(every) // units
            parts = every.view(units, d, units, d) if axis == "heads" else every.view(d, units, d, units)
            total += parts.sum((1, 3) if axis == "heads" else (0, 2))
    return total


def test_images_that_say_nothing_are_refused_before_anything_changes():
    model, dense, _ = lone("plain")
    with pytest.raises(ValueError, match="no batch of calibration images"):
        gather_statistics(model, [])
    broken = [torch.full_like(x, torch.nan) for x in batches(model, 1)]
    with pytest.raises(FloatingPointError, match="a logit is not finite on calibration batch 2"):
        gather_statistics(model, [*batches(model, 1), *broken])
    assert not any(m._watches or m._forward_pre_hooks or m._forward_hooks for m in prunable_layers(model).values())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_run_with_refit_meets_its_targets_and_states_its_cost(rounds):
    more = {"train": False, "refit": True, "criterion": "remaining", "rounds": rounds}
    result = prune(*arguments("registers", **more))
    assert [s.predicted_ratio <= s.target for s in result.snapshots] == [True, True]
    assert len(result.history) == 2 * rounds
    assert all(row["refit_seconds"] > 0 and row["peak_memory"] > 0 for row in result.history)
    again = prune(*arguments("registers", **more))
    a, b = (dict(r.model.named_parameters()) for r in (result, again))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_refit_while_training_is_refused():
    for more in ({"refit": True}, {"criterion": "remaining"}, {"criterion": "curvature"}):
        with pytest.raises(ValueError, match="no-train"):
            PruneConfig(**more).check()


def test_decisions_with_any_criterion_can_be_refitted():
    model, data, settings, table = arguments("plain", train=False, refit=True, criterion="abs")
    assert isinstance(table, LatencyTable)
    result = prune(model, data, settings, table)
    assert all("refit_error" in row for row in result.history)


def test_one_shot_without_a_refit_takes_the_curvature_by_default():
    settings = {"train": False, "latency_target": (0.7,)}
    default, named, fisher = (
        prune(*arguments("plain", **settings, **more)) for more in ({}, {"criterion": "curvature"}, {"budget": "8GB"})
    )
    assert [PruneConfig(train=False, budget=b).saliency for b in ("", "8GB")] == ["curvature", "fisher"]
    masks = [r.masks for r in (default, named, fisher)]
    assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])
    assert any(not torch.equal(masks[0][n], masks[2][n]) for n in masks[0])
    with pytest.raises(ValueError, match=r"does not bound criterion curvature.*fisher"):
        PruneConfig(train=False, criterion="curvature", budget="8GB").check()
