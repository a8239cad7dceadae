"""Captures: several at once give what each gives alone, and nothing is left behind whatever happens inside."""

import contextlib

import pytest
import torch

from nvit import adapters
from nvit.calibration.capture import Enough, capture
from nvit.calibration.gauss_newton import GateProducts
from nvit.calibration.statistics import StatisticsRecorder, gather_statistics
from nvit.criteria.gates import GateRecorder
from nvit.layers import prunable_layers
from nvit.tasks.classification import Classification
from tests.hosts import images, masked

FIELDS = ("images", "rows", "x", "xx", "gg", "profile")


class Broken(Exception):
    """Raised inside a capture on purpose."""


@pytest.fixture(params=["plain", "deit_distilled", "swiglu"])
def case(request):
    """A masked model with frozen weights, its groups and masks."""
    model, groups, masks = masked(request.param)
    return model.requires_grad_(False), groups, masks


def mean_logits(model, x):
    cls, dist = adapters.find(model).logits(model, x)
    return cls if dist is None else (cls + dist) / 2


def places_of(model):
    """All but attention maps, which nothing that follows reads: they have no gradient."""
    return [(n, site) for n, layer in prunable_layers(model).items() for site in layer.sites() if site != "maps"]


def assert_untouched(model):
    for name, layer in prunable_layers(model).items():
        assert not layer._watches and not layer._forward_hooks and not layer._forward_pre_hooks, name


def gates_of(model, groups, masks, x, generator):
    with GateRecorder(model, groups, masks) as recorder:
        z = mean_logits(model, x)
        z.backward(Classification(10).probe(z, generator))
    return recorder.pop()


def assert_same_statistics(got, expected):
    assert got.keys() == expected.keys()
    for place, s in expected.items():
        for name in FIELDS:
            a, b = getattr(got[place], name), getattr(s, name)
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, (place, name)


@pytest.mark.parametrize("gates_first", [True, False])
def test_gates_and_statistics_at_once_are_those_of_each_alone(case, gates_first):
    model, groups, masks = case
    x, alone_products, products = images(model, 4), GateProducts(), GateProducts()
    expected_statistics = gather_statistics(model, [x], gates=alone_products, seed=5)
    expected_gates = gates_of(model, groups, masks, x, torch.Generator().manual_seed(5))
    both = [GateRecorder(model, groups, masks), StatisticsRecorder(model, gates=products, seed=5)]
    recorder, statistics = both
    with contextlib.ExitStack() as stack:
        for opened in both if gates_first else both[::-1]:
            stack.enter_context(opened)
        statistics.backward(mean_logits(model, x))
    assert_same_statistics(statistics.statistics, expected_statistics)
    assert all(torch.equal(g, alone_products.sums[p]) for p, g in products.sums.items())
    gates = recorder.pop()
    assert all(torch.equal(gates[n], g) for n, g in expected_gates.items())
    assert_untouched(model)


def test_captures_may_close_in_any_order(case):
    model, groups, masks = case
    x = images(model, 3)
    expected = gates_of(model, groups, masks, x, torch.Generator().manual_seed(0))
    first, second = StatisticsRecorder(model), GateRecorder(model, groups, masks)
    first.__enter__()
    second.__enter__()
    first.__exit__()
    first.__exit__()  # again, it does nothing
    z = mean_logits(model, x)
    z.backward(Classification(10).probe(z, torch.Generator().manual_seed(0)))
    second.__exit__()
    assert not first.statistics
    gates = second.pop()
    assert all(torch.equal(gates[n], g) for n, g in expected.items())
    assert_untouched(model)


def test_what_is_captured_forward_is_what_is_captured_with_its_gradient(case):
    model, _, _ = case
    x, forward, backward = images(model, 3), {}, {}
    places = [p for p in places_of(model) if p[1] != "end"]
    with (
        capture(model, places, lambda place, act, _: forward.setdefault(place, act.clone()), gradients=False),
        capture(model, places, lambda place, act, grad: backward.setdefault(place, (act.clone(), grad.clone()))),
    ):
        mean_logits(model, x).sum().backward()
    assert backward.keys() <= forward.keys() and len(backward) > 4
    for place, (act, grad) in backward.items():
        torch.testing.assert_close(act, forward[place], rtol=1e-6, atol=1e-6, msg=str(place))  # some are recomputed
        assert grad.shape == act.shape and bool(grad.isfinite().all())


def raising(*_):
    raise Broken


@pytest.mark.parametrize("where", ["forward", "sink, forward", "sink, backward", "backward", "outside"])
def test_nothing_is_left_behind_after_an_exception(case, where):
    """Neither on the layers nor in what another capture, or the next one, sees."""
    model, groups, masks = case
    x, places, last = images(model, 3), places_of(model), model.blocks[-1]
    with torch.no_grad():
        before = mean_logits(model, x)
    expected = gates_of(model, groups, masks, x, torch.Generator().manual_seed(0))
    hooks = []
    if where == "forward":
        hooks.append(last.register_forward_pre_hook(raising))
    if where == "backward":
        hooks.append(last.register_forward_hook(lambda _, args, out: out.register_hook(raising) and None))
    sink = raising if where.startswith("sink") else lambda *_: None
    with (
        pytest.raises(Broken),
        GateRecorder(model, groups, masks),
        capture(model, places, sink, gradients=where != "sink, forward"),
        StatisticsRecorder(model) as statistics,
    ):
        z = mean_logits(model, x)
        statistics.backward(z)
        assert where == "outside"
        raise Broken
    for hook in hooks:
        hook.remove()
    assert_untouched(model)
    with torch.no_grad():
        assert torch.equal(mean_logits(model, x), before)
    again = gates_of(model, groups, masks, x, torch.Generator().manual_seed(0))
    assert all(torch.equal(again[n], g) for n, g in expected.items())


def test_a_site_that_does_not_exist_is_refused_and_leaves_nothing(case):
    model, _, _ = case
    good = ("blocks.0.mlp", "out")
    with pytest.raises(ValueError, match=r"has no site 'middle'; it has in, end, out"):
        capture(model, [good, ("blocks.0.mlp", "middle")], raising).__enter__()
    with pytest.raises(KeyError, match=r"blocks\.9\.mlp"):
        capture(model, [good, ("blocks.9.mlp", "out")], raising).__enter__()
    assert_untouched(model)


def test_a_sink_ends_the_forward_pass_once_it_has_enough(case):
    model, _, _ = case
    reached = []

    def stop(place, act, _):
        reached.append(place)
        raise Enough

    places = [("blocks.0.mlp", "in"), ("blocks.1.mlp", "in")]
    with pytest.raises(Enough), capture(model, places, stop, gradients=False), torch.no_grad():
        mean_logits(model, images(model))
    assert reached == [("blocks.0.mlp", "in")]
    assert_untouched(model)


def test_without_gradients_nothing_is_handed_out_and_outputs_are_the_same(case):
    model, _, _ = case
    x = images(model)
    with torch.no_grad():
        before = mean_logits(model, x)
        with capture(model, places_of(model), raising):
            torch.testing.assert_close(mean_logits(model, x), before, rtol=1e-6, atol=1e-6)
