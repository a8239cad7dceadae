"""Runs in which attention or MLP of a block leave whole."""

import pytest
import torch

from nvit import LatencyTable, PruneConfig, adapters, prune, snapshot, tasks
from nvit.latency.spread import Ratio
from nvit.layers import Absent, prunable_layers
from nvit.prune.limits import least_ms
from nvit.prune.pruner import Pruner
from nvit.refit.costs import measure_costs
from nvit.refit.judge import Deal
from nvit.refit.ridge import Moments, ridge
from nvit.selection.curves import Curve
from nvit.structure.compact import compact
from nvit.structure.masks import full_masks, widths
from tests.families import HOSTS
from tests.hosts import make

BUNDLES = {"bundle_heads": 1, "bundle_emb": 16, "bundle_qk": 4, "bundle_v": 4, "bundle_mlp": 16}
RUN = {"train": False, "refit": True, "depth": True, "batch_size": 4} | BUNDLES


def batches(model, count=5):
    size, draw = adapters.preprocess(model)["input_size"], torch.Generator().manual_seed(0)
    return [(torch.randn(4, *size, generator=draw), torch.zeros(4, dtype=torch.long)) for _ in range(count)]


def out(model, x):
    with torch.no_grad():
        return torch.cat([t for t in adapters.find(model).logits(model, x) if t is not None], -1)


@pytest.mark.parametrize(("host", "rounds"), [("deit3", 1), ("plain", 2), ("hf_dinov2_registers", 1)])
def test_a_run_goes_where_only_whole_sublayers_lead(host, rounds, tmp_path):
    """Below what the last bundles of every group reach, to two targets in turn."""
    model = HOSTS[host]() if host in HOSTS else make(host)
    data = batches(model)
    adapter = adapters.find(model)
    groups = adapter.groups(adapter.prepare(model), PruneConfig(**RUN).bundle_sizes)
    table = LatencyTable.analytic(model, PruneConfig(**RUN).bundle_sizes)
    reach, least = (least_ms(table, groups, groups, depth) / table.dense_ms for depth in (False, True))
    targets = tuple(round(least + share * (reach - least), 4) for share in (0.9, 0.3))
    with pytest.raises(ValueError, match="cannot be met"):
        prune(model, data, PruneConfig(latency_target=targets, **RUN | {"depth": False}), table)
    result = prune(model, data, PruneConfig(latency_target=targets, rounds=rounds, **RUN), table)
    x, absent = data[0][0], []
    for pruned in result.snapshots:
        assert pruned.predicted_ratio <= pruned.target
        absent.append({n for n, m in prunable_layers(pruned.model).items() if isinstance(m, Absent)})
        back = snapshot.load(pruned.save(tmp_path / f"{pruned.target}"))
        torch.testing.assert_close(out(back, x), out(pruned.model, x), rtol=0, atol=1e-5)
    assert absent[0] and absent[0] <= absent[1], "what has left stays away"
    torch.testing.assert_close(out(result.model, x), out(model.eval(), x), rtol=0, atol=1e-5)
    errors = [row["refit_error"] for row in result.history]
    assert errors[0] < 1 and max(errors) <= 1


def test_a_layer_without_inputs_is_refitted_to_the_mean_of_what_it_lacks():
    draw = torch.Generator().manual_seed(0)
    r, w = torch.randn(60, 3, generator=draw) + torch.tensor([1.0, -2, 0]), torch.rand(60, generator=draw)
    halves = [Moments.empty(0, 3) for _ in range(2)]
    for half, rows in zip(halves, (slice(0, 40), slice(40, 60)), strict=True):
        half.add(torch.zeros(60, 0)[rows], r[rows], r[rows], w[rows])
    change = ridge(*halves)
    mean = (w[:, None] * r).sum(0) / w.sum()
    torch.testing.assert_close(change.bias.float(), mean)
    assert change.weight.shape == (3, 0) and ridge(*halves, constant=False) is None
    fitted = (w[:40, None] * r[:40]).sum(0) / w[:40].sum()
    expected = ((r[40:] - fitted).square() * w[40:, None]).sum() / w[40:].sum()
    assert change.after == pytest.approx(float(expected), rel=1e-4) and change.before > change.after


def test_the_cost_of_a_sublayer_is_the_distance_of_the_model_with_its_mean_in_its_place():
    model = make("plain")
    adapter, task = adapters.find(model), tasks.of("classification", model)
    groups = adapter.groups(adapter.prepare(model))
    xs = [x for x, _ in batches(model, 6)]
    scores = {g.name: torch.rand(g.size) for g in groups if g.name in ("blocks.0.heads", "blocks.1.mlp")}
    curves = measure_costs(model, groups, scores, xs, task=task, depth=True)
    deal = Deal()
    fit, held, shown = (torch.cat(hand) for hand in zip(*map(deal.of, xs), strict=True))
    for name, site in (("blocks.0.heads", "blocks.0.attn.proj"), ("blocks.1.mlp", "blocks.1.mlp.fc2")):
        seen = []
        hook = model.get_submodule(site).register_forward_hook(lambda _, x, y, seen=seen: seen.append(y.flatten(0, 1)))
        for images in (fit, held):
            out(model, images)
        hook.remove()
        bias = model.get_submodule(site).bias.detach()
        error = [(seen[1] - b).square().mean(0) for b in (bias, seen[0].mean(0))]
        mean = torch.where(error[1] < error[0], torch.cat(seen).mean(0), bias)
        group = next(g for g in groups if g.name == name)
        masks = full_masks(groups)
        for ended in (name, *group.ends):
            masks[ended][:] = False
        small = compact(model, groups, masks)
        block = small.blocks[group.blocks[0]]
        with torch.no_grad():
            (block.attn if group.ends else block.mlp).bias.copy_(mean)
            expected = task.distance(adapter.logits(small, shown), adapter.logits(model, shown), 1.0)
        assert curves[name].gone[-1] == group.size
        assert curves[name].cost[-1] == pytest.approx(float(expected), rel=1e-3)


def chooser(cost, **more):
    """A pruner, and a measure by which a whole sublayer costs hardly more than half of one of its groups."""
    model = make("plain")
    config = PruneConfig(**RUN | {"cost": cost, "measure_seconds": 0.0} | more)
    pruner = Pruner(model, LatencyTable.analytic(model, config.bundle_sizes), config)
    draw = torch.Generator().manual_seed(0)
    scores = {g.name: torch.rand(g.size, generator=draw) for g in pruner.free}
    pruner.scores = lambda: dict(scores)
    whole = [(g.name, Curve((g.size // 2, g.size), (10.0, 10.001))) for g in pruner.free if g.ends is not None]
    curves = dict(whole) | {
        g.name: Curve((g.size // 2,), (1e3 if g.kind == "emb" else 10.0,)) for g in pruner.free if g.ends is None
    }
    return pruner, lambda _: curves


def absent(masks):
    return sum(not bool(keep.any()) for keep in masks.values())


@pytest.mark.parametrize("cost", ["auto", "both", "measured"])
def test_of_choices_with_and_without_sublayers_the_nearer_one_is_taken(cost):
    taken = {}
    for sign in (1, -1):
        pruner, measure = chooser(cost, latency_target=0.5)
        pruner.decide_at(0.5, measure, lambda masks, s=sign: s * absent(masks))
        row = pruner.history[-1]
        taken[row["cost"]] = absent(pruner.masks)
        told = {key for key in row if key.startswith("distance_")}
        more = set() if cost == "measured" else {"distance_predicted", "distance_between"}
        assert told == {"distance_measured", "distance_depth", "distance_less depth"} | more
    assert taken.pop("depth") > 0 and set(taken.values()) == {0}


def test_less_depth_is_tried_too():
    """Where sublayers cost twice what they did alone, fewer leave; a judge that wants so many takes it."""
    pruner, measure = chooser("measured", latency_target=0.5)
    ways = pruner.ways(measure)
    assert ways["less depth"].ends == {name: 2 * cost for name, cost in ways["depth"].ends.items()}
    left = {way: absent(pruner._least(prices, 0.5)[0]) for way, prices in ways.items()}
    assert left["depth"] > left["less depth"] >= left["measured"] == 0
    wanted = left["less depth"]
    pruner.decide_at(0.5, None, lambda masks: abs(absent(masks) - wanted))
    assert absent(pruner.masks) == wanted


def test_what_only_whole_sublayers_reach_is_reached():
    """At first, and where what was measured asks for less than the choice without them can give."""
    pruner, measure = chooser("auto", latency_target=0.6)
    reach = least_ms(pruner.table, pruner.groups, pruner.free) / pruner.table.dense_ms
    pruner.decide_at(0.99 * reach, measure, absent)
    assert absent(pruner.masks) and "distance_measured" not in pruner.history[-1]

    pruner, measure = chooser("measured", latency_target=0.6)
    pruner.decide_at(0.4, measure, lambda masks: -absent(masks))
    assert absent(pruner.masks)
    pruner.decide_at(0.99 * reach, None, absent)
    assert pruner.history[-1]["cost"] == "measured", "what has left holds nobody back"

    target = 1.05 * reach
    pruner, measure = chooser("auto", latency_target=target)
    pruner._cut = lambda masks: masks
    pruner.aim.clock = lambda masks: Ratio(1.2 * pruner.table.ratio(widths(pruner.groups, masks)), 0.0)
    pruner.decide_at(target, measure, absent)
    row = pruner.history[-1]
    assert row["cost"] != "depth" and absent(pruner.masks)
    assert row["measured_ratio"] <= target


def test_depth_is_refused_in_a_line_where_it_cannot_be():
    model = HOSTS["swin_three_stages"]()
    with pytest.raises(ValueError, match="depth: no attention or MLP of this model may leave whole"):
        prune(model, batches(model), PruneConfig(latency_target=0.5, **RUN), LatencyTable.analytic(model))
    for odd, why in (({"refit": False}, "add --refit"), ({"cost": "predicted"}, "leave out --cost predicted")):
        with pytest.raises(ValueError, match=why):
            PruneConfig(**RUN | odd).check()
