"""Criteria against straight-line formulas, and the two routes to a gate gradient against each other."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nvit import adapters
from nvit.criteria.base import Evidence, RunningMean
from nvit.criteria.fisher import SHRINK
from nvit.criteria.gates import GateRecorder
from nvit.criteria.gradients import gate_gradients, unit_saliency
from nvit.criteria.registry import CRITERIA
from nvit.criteria.turns import leave_in_turn
from nvit.structure.masks import apply_
from tests import references
from tests.hosts import TINY_HOSTS, images, labels, masks_for, prepared, random_masks

FORMULAS = {name: getattr(references, name) for name in ("hessian", "nvit", "taylor", "magnitude")}
WITH_CLASSES = [host for host in TINY_HOSTS if host != "no_classifier"]


def loss_of(model, x, y):
    cls, dist = adapters.find(model).logits(model, x)
    return F.cross_entropy(cls if dist is None else (cls + dist) / 2, y)


def backward(model, x, y) -> tuple[dict, dict]:
    """Parameters and fp64 gradients by name; a parameter the loss does not reach has none."""
    model.zero_grad()
    loss_of(model, x, y).backward()
    params = dict(model.named_parameters())
    return params, {name: p.grad.clone() for name, p in params.items() if p.grad is not None}


def record(model, groups, masks, x, y) -> dict:
    with GateRecorder(model, groups, masks) as gates:
        loss_of(model, x, y).backward()
    return gates.pop()


def shape(model) -> tuple[int, int, int]:
    attn = model.blocks[0].attn
    return len(model.blocks), attn.heads, attn.qk_dim


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # Relative to the group's largest: a unit whose terms cancel is as exact as the terms, not as their sum.
        atol = 1e-10 * float(value.abs().max())
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("host", WITH_CLASSES)
@pytest.mark.parametrize("criterion", FORMULAS)
def test_criterion_equals_its_formula(criterion, host):
    model, groups = prepared(host, torch.float64)
    params, grads = backward(model, images(model, 4), labels(model, 4))
    got = CRITERIA[criterion].score(groups, Evidence(params, grads))
    expected = FORMULAS[criterion](params, grads, *shape(model))
    assert_close(got, expected)
    assert all(v.shape == (g.size,) and v.dtype == torch.float64 for g in groups for v in [got[g.name]])


@pytest.mark.parametrize("criterion", FORMULAS)
def test_criterion_equals_its_formula_on_a_pruned_model(criterion):
    """Kept units score by what is kept; pruned units have no weight left and score zero."""
    model, groups = prepared("deit_distilled", torch.float64)
    masks = random_masks(groups)
    apply_(model, groups, masks)
    params, grads = backward(model, images(model, 4), labels(model, 4))
    got = CRITERIA[criterion].score(groups, Evidence(params, grads))
    assert_close(got, FORMULAS[criterion](params, grads, *shape(model)))
    for g in groups:
        assert not got[g.name][~masks[g.name]].any()
        assert got[g.name][masks[g.name]].all()


@pytest.mark.parametrize("host", WITH_CLASSES)
@pytest.mark.parametrize("batch", [1, 3])
def test_activations_route_equals_weights_route(host, batch):
    """With masks and without, odd batches included; the recorded route sees frozen weights.

    LayerNorm makes one channel a constant and two of them ±1: their gradients are rounding, so four are kept at least.
    """

    @settings(max_examples=3)
    @given(st.data())
    def check(data):
        model, groups = prepared(host, torch.float64)
        masks = data.draw(masks_for(groups, least_channels=4))
        apply_(model, groups, masks)
        x, y = images(model, batch), labels(model, batch)
        params, grads = backward(model, x, y)
        from_weights = CRITERIA["hessian"].score(groups, Evidence(params, grads))
        model.requires_grad_(False)
        gates = record(model, groups, masks, x, y)
        assert all(gates[g.name].shape == (batch, g.size) for g in groups)
        assert_close(CRITERIA["hessian"].score(groups, Evidence(params, {}, gates)), from_weights)

    check()


@pytest.mark.parametrize("host", ["plain", "deit_distilled", "registers", "average_pooling"])
def test_absolute_is_the_mean_over_samples_of_their_own_loss(host):
    model, groups = prepared(host, torch.float64)
    masks = random_masks(groups)
    apply_(model, groups, masks)
    x, y = images(model, 5), labels(model, 5)
    samples = [backward(model, x[i : i + 1], y[i : i + 1])[1] for i in range(5)]
    gates = record(model, groups, masks, x, y)
    expected = references.absolute(dict(model.named_parameters()), samples, *shape(model))
    assert_close(CRITERIA["abs"].score(groups, Evidence({}, {}, gates)), expected)


@pytest.mark.parametrize("host", ["plain", "deit_distilled"])
def test_fisher_lets_the_cheapest_unit_leave_given_those_gone(host):
    """In two batches of different sizes, whose mean over batches goes into one order."""
    model, groups = prepared(host, torch.float64)
    masks = random_masks(groups)
    apply_(model, groups, masks)
    mean, criterion, expected = RunningMean(), CRITERIA["fisher"], []
    for seed in (0, 1):
        x, y = images(model, 4, seed), labels(model, 4, seed)
        expected += [backward(model, x[i : i + 1], y[i : i + 1])[1] for i in range(4)]
        mean.update(criterion.score(groups, Evidence({}, {}, record(model, groups, masks, x, y))))
    got = criterion.scores(mean.value())
    params = dict(model.named_parameters())
    assert_close(got, references.fisher(params, expected, *shape(model), SHRINK))
    for g in groups:
        assert got[g.name].shape == (g.size,)
        assert len(got[g.name].unique()) == g.size, "sorting gives one order"


def test_fisher_takes_what_cancels_together():
    """Once the first has left, the one that does its opposite follows before a smaller one that does the same."""
    gates = torch.tensor([[1.0, -1.5, 1.1]])
    assert gates[0].abs().argsort().tolist() == [0, 2, 1]
    saliency = leave_in_turn(gates.T @ gates)
    assert saliency.argsort().tolist() == [0, 1, 2]
    # It adds 9/8 - 3/4 of shrunk product, less than the half that the first added.
    torch.testing.assert_close(saliency, torch.full((3,), 0.5, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["heads", "v_dim", "mlp", "emb"])
def test_gate_gradient_is_the_slope_of_the_loss_in_the_gate(kind):
    """Independent of any formula for it: multiply what leaves through the gate by 1 ± h and look at the loss."""
    model, groups = prepared("deit_distilled", torch.float64)
    group = next(g for g in groups if g.kind == kind)
    x, y, unit, h = images(model, 4), labels(model, 4), 1, 1e-5
    gates = record(model, groups, {g.name: torch.ones(g.size, dtype=torch.bool) for g in groups}, x, y)
    params, losses = dict(model.named_parameters()), []
    for factor in (1 + h, 1 - h):
        with torch.no_grad():
            for s in group.scored_slices:
                part = s.of(params[s.name]).select(s.axis, unit)
                part.mul_(factor)
            losses.append(float(loss_of(model, x, y)))
            for s in group.scored_slices:
                s.of(params[s.name]).select(s.axis, unit).div_(factor)
    slope = (losses[0] - losses[1]) / (2 * h)
    # Central differences err by h² times the third derivative and by 1e-16 / h of cancellation.
    assert gates[group.name].sum(0)[unit].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_unit_saliency_sums_first_and_squares_last():
    model, groups = prepared("plain", torch.float64)
    params, grads = backward(model, images(model, 4), labels(model, 4))
    every = references.hessian(params, grads, *shape(model))
    for g in groups:
        assert_close({g.name: unit_saliency(g, params, grads)}, {g.name: every[g.name]})


def test_a_frozen_parameter_is_named():
    model, groups = prepared("plain")
    params, grads = backward(model, images(model), labels(model, 3))
    del grads["blocks.1.mlp.fc2.weight"]
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp: nothing scores it.*blocks\.1\.mlp\.fc2\.weight"):
        gate_gradients(groups, params, grads)


def test_low_precision_gradients_are_summed_in_fp32():
    """A thousand products of 1 + 2⁻⁸ in bfloat16 would lose their last digits."""
    model, groups = prepared("plain", torch.bfloat16)
    params = dict(model.named_parameters())
    grads = {name: torch.ones_like(p) for name, p in params.items()}
    for name, total in gate_gradients(groups, params, grads).items():
        assert total.dtype == torch.float32
        exact = gate_gradients(
            groups, {n: p.detach().double() for n, p in params.items()}, {n: g.double() for n, g in grads.items()}
        )[name]
        torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)


def test_gates_leave_no_trace_when_closed():
    model, groups = prepared("plain")
    masks = {g.name: torch.ones(g.size, dtype=torch.bool) for g in groups}
    x = images(model)
    before = model(x)
    with GateRecorder(model, groups, masks):
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert torch.equal(model(x), before)
    assert all(not getattr(m, "_watches", None) for m in model.modules())


def test_random_is_uniform_reproducible_and_differs_by_group_and_seed():
    _, groups = prepared("plain")
    first, again, other = (CRITERIA["random"].score(groups, Evidence({}, seed=s)) for s in (1, 1, 2))
    for g in groups:
        assert torch.equal(first[g.name], again[g.name])
        assert not torch.equal(first[g.name], other[g.name])
        assert ((first[g.name] >= 0) & (first[g.name] < 1)).all()
    assert not torch.equal(first["blocks.0.mlp"], first["blocks.1.mlp"])
    # 288 uniform draws have a mean within 0.5 ± 4 standard deviations of 0.017
    assert abs(torch.cat(list(first.values())).mean() - 0.5) < 0.07


@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])
def test_running_mean_is_unbiased_from_the_first_batch(momentum):
    rows = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = RunningMean(momentum)
    for n, row in enumerate(rows, start=1):
        for batch in (row + 0.25, row - 0.25):  # the batches between two decisions count alike
            mean.update({"a": batch})
        if momentum is None:
            expected = rows[:n].mean(0)
        else:
            weight = torch.tensor([momentum ** (n - 1 - i) for i in range(n)], dtype=torch.float64)
            expected = (weight[:, None] * rows[:n]).sum(0) / weight.sum()
        torch.testing.assert_close(mean.value()["a"], expected, rtol=1e-12, atol=0)
        mean.decided()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_running_mean_keeps_its_state_when_a_score_is_not_finite(bad):
    mean = RunningMean()
    mean.update({"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(ValueError, match="b: saliency is not finite after 1 good batches"):
        mean.update({"a": torch.ones(2), "b": torch.tensor([1.0, bad])})
    assert mean.count == 1 and torch.equal(mean.value()["a"], torch.ones(2))
    with pytest.raises(ValueError, match="no batch"):
        RunningMean().value()
