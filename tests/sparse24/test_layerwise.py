"""2:4 by curvature on whole models: masks, what comes out, what is left alone."""

import copy

import pytest
import torch

import nvit
from nvit import adapters, snapshot, sparse24
from nvit.sparse24.profile import row_profiles
from nvit.training.digits import Digits
from tests.families import HOSTS, ONE_OF_EACH
from tests.hosts import images, prepared


def batches(model, count=3, size=4):
    return [images(model, size, seed=10 + i) for i in range(count)]


def digits(count=128):
    data = Digits(training=True)
    return torch.stack([data[i][0] for i in range(count)]).split(32)


def by_curvature(model, batches, names=None):
    return sparse24.choose_by_curvature_(model, batches, sparse24.masks_2to4(model) if names is None else names)


def distance(model, exact, x):
    with torch.no_grad():
        return float((model(x) - exact).norm())


def test_masks_are_2to4_and_outputs_nearer_than_by_magnitude():
    model = nvit.load(nvit.BUNDLED)
    data = Digits(training=False)
    x = torch.stack([data[i][0] for i in range(100)])
    by_magnitude = copy.deepcopy(model)
    sparse24.apply_masks_(by_magnitude, sparse24.masks_2to4(by_magnitude))
    with torch.no_grad():
        exact = model(x)
    masks = by_curvature(model, digits())
    assert set(masks) == set(sparse24.masks_2to4(model)) and len(masks) == 16
    for name, mask in masks.items():
        assert bool((mask.unflatten(1, (-1, 4)).sum(2) == 2).all())
        assert bool((sparse24.projections(model)[name].weight[~mask] == 0).all())
    assert distance(model, exact, x) < 0.5 * distance(by_magnitude, exact, x)


@pytest.mark.parametrize("host", ONE_OF_EACH)
def test_every_family(host):
    model = HOSTS[host]()
    adapter = adapters.find(model)
    adapter.prepare(model)
    size = adapters.preprocess(model)["input_size"]
    x = torch.randn(6, *size, generator=torch.Generator().manual_seed(0))
    names = set(sparse24.masks_2to4(model))
    dense = copy.deepcopy(model)
    masks = by_curvature(model, x.split(3))
    assert names and set(masks) == names
    for name, linear in sparse24.projections(model).items():
        zeros = (linear.weight == 0).unflatten(1, (-1, 4)) if linear.in_features % 4 == 0 else linear.weight == 0
        assert bool((zeros.sum(2) >= 2).all()) if name in names else not bool(zeros.any())
    for p, was in zip(model.parameters(), dense.parameters(), strict=True):
        assert p.requires_grad == was.requires_grad and p.dtype == was.dtype
        assert bool(p.isfinite().all())


def test_a_shape_that_does_not_fit_stays_dense():
    model, _ = prepared("plain", mlp_ratio=1.9)
    masks = by_curvature(model, batches(model))
    assert {n.split(".")[-2] for n in masks} == {"qkv", "proj"}
    assert not bool((model.blocks[0].mlp.fc1.weight == 0).any())


def test_only_named_projections_get_masks():
    model, _ = prepared("plain")
    masks = by_curvature(model, batches(model), ["blocks.1.mlp.fc1.weight"])
    assert set(masks) == {"blocks.1.mlp.fc1.weight"}
    assert not bool((model.blocks[1].mlp.fc2.weight == 0).any())


def test_nothing_to_make_sparse_changes_nothing():
    """With exact inputs the best dense weight is the layer's own."""
    model, _ = prepared("deit3", torch.float64)
    before = copy.deepcopy(model.state_dict())
    assert by_curvature(model, batches(model), []) == {}
    for name, now in model.state_dict().items():
        torch.testing.assert_close(now, before[name], rtol=0, atol=1e-9, msg=name)


def test_the_choice_is_the_same_every_time():
    found = []
    for _ in range(2):
        model, _ = prepared("plain")
        found.append((by_curvature(model, batches(model)), model.state_dict()))
    (masks, weights), (again, weights_again) = found
    assert all(torch.equal(m, again[n]) for n, m in masks.items())
    assert all(torch.equal(w, weights_again[n]) for n, w in weights.items())


def test_where_nothing_comes_in_magnitudes_decide():
    model, _ = prepared("relu", torch.float64)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.zero_()
        model.blocks[0].mlp.fc1.bias.fill_(-1.0)  # all hidden units are off
    weight = model.blocks[0].mlp.fc2.weight.detach().clone()
    expected = sparse24.masks_2to4(model)["blocks.0.mlp.fc2.weight"]
    mask = by_curvature(model, batches(model))["blocks.0.mlp.fc2.weight"]
    assert torch.equal(mask, expected)
    torch.testing.assert_close(model.blocks[0].mlp.fc2.weight.detach(), weight * mask)


def test_a_snapshot_of_it_reloads_equal(tmp_path):
    model = nvit.load(nvit.BUNDLED)
    model.sparse24 = tuple(by_curvature(model, digits(64)))
    snapshot.save(tmp_path / "s", model)
    again = nvit.load(tmp_path / "s")
    x = digits(8)[0]
    assert again.sparse24 == model.sparse24 and torch.equal(again(x), model(x))


def test_rows_that_no_output_depends_on_count_for_nothing():
    """The last layer's patches do not reach the class token."""
    model, _ = prepared("plain")
    profiles = row_profiles(model, batches(model))
    last = profiles["blocks.1.mlp", "out"]
    assert float(last[0]) > 0 and float(last[1:].abs().max()) == 0
    assert float(profiles["blocks.0.mlp", "out"][1:].min()) > 0
    assert all(p.requires_grad for p in model.parameters())


def test_what_cannot_be_calibrated_on_is_refused():
    model, _ = prepared("plain")
    with pytest.raises(ValueError, match="no batch of calibration images"):
        by_curvature(model, [])
    with pytest.raises(FloatingPointError, match="not finite on calibration batch 2"):
        by_curvature(model, [images(model), images(model) * float("nan")])
