"""Costs measured group by group, against a cut model with the same refit made by hand."""

import copy

import pytest
import torch
from torch.nn.functional import linear

from nvit import adapters, tasks
from nvit.calibration.statistics import gather_statistics
from nvit.layers import prunable_layers
from nvit.refit import costs
from nvit.refit.costs import measure_costs
from nvit.refit.inputs import Inputs
from nvit.refit.judge import MEASURED, Deal
from nvit.refit.ridge import Moments, ridge
from nvit.selection.curves import depths
from nvit.structure.compact import compact
from nvit.structure.masks import full_masks
from tests.families import HOSTS, ONE_OF_EACH
from tests.hosts import make


def case(host, count=3, size=7, task="classification"):
    """A model, its groups, images, scores at random, its task."""
    model = HOSTS[host]() if host in HOSTS else make(host)
    adapter = adapters.find(model)
    groups = adapter.groups(adapter.prepare(model))
    shape = size, *adapters.preprocess(model)["input_size"]
    draw = torch.Generator().manual_seed(0)
    scores = {g.name: torch.rand(g.size, generator=draw) for g in groups}
    return model, groups, [torch.randn(shape, generator=draw) for _ in range(count)], scores, tasks.of(task, model)


def test_moments_of_any_cut_are_those_of_the_rows():
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(50, 6, generator=draw, dtype=torch.float64), torch.rand(50, generator=draw))
    weight, cols = torch.randn(4, 6, generator=draw, dtype=torch.float64), torch.tensor([0, 2, 5])
    inputs, expected = Inputs(), Moments.empty(3, 4)
    for rows in (slice(0, 20), slice(20, 50)):
        inputs.add(x[rows], w[rows])
        lacking = linear(x[rows], weight) - linear(x[rows][:, cols], weight[:, cols])
        expected.add(x[rows][:, cols], lacking, linear(x[rows], weight), w[rows])
    found = inputs.without(weight, cols)
    for field in Moments.__dataclass_fields__:
        torch.testing.assert_close(getattr(found, field), getattr(expected, field))


CASES = [(host, "classification") for host in ONE_OF_EACH]
CASES += [("odd_sizes", "multilabel"), ("no_classifier", "features")]


@pytest.mark.parametrize(("host", "task"), CASES)
def test_every_group_is_measured_and_the_model_stays_as_it_was(host, task):
    model, groups, xs, scores, task = case(host, task=task)
    if not task.outputs:  # features keep their width
        scores.pop("emb")
    statistics = gather_statistics(model, xs)
    before = copy.deepcopy(model.state_dict())
    told = []
    curves = measure_costs(
        model, groups, scores, xs, task=task, statistics=statistics, progress=lambda *a: told.append(a)
    )
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not any(getattr(m, index) is not None for m in prunable_layers(model).values() for index in m._indices)
    for g in (g for g in groups if g.name in scores):
        expected = depths(g.size, g.multiple, costs.DEPTHS.get(g.kind, costs.DEPTHS["heads"]))
        assert (g.name in curves) == bool(expected)
        if expected:
            assert list(curves[g.name].gone) == expected and all(c > 0 for c in curves[g.name].cost), g.name
    assert told[-1][0] == told[-1][1] == sum(len(c.gone) for c in curves.values())


def test_a_cost_is_the_distance_of_the_model_cut_there_its_reader_refitted():
    """Half of the hidden units of the first block, against a compact model whose reader is refitted row by row."""
    model, groups, xs, scores, task = case("plain")
    name = "blocks.0.mlp"
    curve = measure_costs(model, groups, {name: scores[name]}, xs, task=task)[name]
    hands = [[], [], []]
    deal = Deal()
    for x in xs:
        for hand, some in zip(hands, deal.of(x), strict=True):
            hand.append(some)
    fit, held, shown = (torch.cat(h) for h in hands)
    assert len(fit) + len(held) + len(shown) == 21 and len(shown) == 5

    keep = torch.ones(len(scores[name]), dtype=torch.bool)
    keep[scores[name].argsort(stable=True)[: curve.gone[1]]] = False
    mlp, seen = prunable_layers(model)[name], []
    with torch.no_grad():
        hook = mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        for x in (fit, held):
            model(x)
        hook.remove()
        small, weight = copy.deepcopy(model), mlp.fc2.weight
        both = [moments_of(x[:, keep], linear(x[:, ~keep], weight[:, ~keep]), linear(x, weight)) for x in seen]
        change = ridge(*both)
        fc2 = prunable_layers(small)[name].fc2
        fc2.weight[:, keep] += change.weight.float()
        fc2.bias += change.bias.float()
        cut = compact(small, groups, full_masks(groups) | {name: keep})
        logits = adapters.find(cut).logits
        expected = task.distance(logits(cut, shown), adapters.find(model).logits(model, shown), 1.0)
    assert curve.cost[1] == pytest.approx(float(expected), rel=1e-3)


def test_queries_cut_cost_what_a_refitted_projection_leaves():
    """Half of the first block's query and key dims: heads' outputs change, and the projection reads the new ones."""
    model, groups, xs, scores, task = case("plain")
    name = "blocks.0.qk_dim"
    curve = measure_costs(model, groups, {name: scores[name]}, xs, task=task)[name]
    deal, hands = Deal(), [[], [], []]
    for x in xs:
        for hand, some in zip(hands, deal.of(x), strict=True):
            hand.append(some)
    fit, held, shown = (torch.cat(h) for h in hands)
    keep = torch.ones(len(scores[name]), dtype=torch.bool)
    keep[scores[name].argsort(stable=True)[: curve.gone[0]]] = False
    with torch.no_grad():
        cut = compact(copy.deepcopy(model), groups, full_masks(groups) | {name: keep})
        rows = [[reads(m, "blocks.0.attn.proj", x) for m in (cut, model)] for x in (fit, held)]
        proj = cut.get_submodule("blocks.0.attn.proj")
        weight = proj.weight
        change = ridge(*(moments_of(x, linear(exact - x, weight), linear(exact, weight)) for x, exact in rows))
        logits = adapters.find(cut).logits
        dense = adapters.find(model).logits(model, shown)
        unfitted = float(task.distance(logits(cut, shown), dense, 1.0))
        proj.weight += change.weight.float()
        proj.bias += change.bias.float()
        expected = float(task.distance(logits(cut, shown), dense, 1.0))
    assert curve.cost[0] == pytest.approx(expected, rel=1e-3) and expected != pytest.approx(unfitted, rel=0.02)


def reads(model, layer, x):
    """Rows that a linear layer of a model reads."""
    found = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    model(x)
    hook.remove()
    return found[0]


def moments_of(x, r, targets):
    found = Moments.empty(x.shape[1], r.shape[1])
    found.add(x, r, targets)
    return found


def test_images_are_dealt_alike_however_they_come_in_batches():
    every = torch.arange(1000)
    found = []
    for size in (1, 7, 1000):
        deal, hands = Deal(), [[], [], []]
        for batch in every.split(size):
            for hand, some in zip(hands, deal.of(batch), strict=True):
                hand.append(some)
        found.append([torch.cat(h).tolist() for h in hands])
    assert found[0] == found[1] == found[2]
    assert [len(h) for h in found[0]][2] == MEASURED and len(found[0][1]) == pytest.approx(904 / 5, abs=1)


def test_one_image_measures_nothing():
    model, groups, xs, scores, task = case("plain", 1, 1)
    with pytest.raises(ValueError, match="there are 1; give at least 2"):
        measure_costs(model, groups, scores, xs, task=task)
