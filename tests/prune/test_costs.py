"""One-shot runs whose groups are priced by measured costs."""

from types import SimpleNamespace

import pytest
import torch

from nvit import PruneConfig, prune
from nvit.cli.prune import tell
from nvit.prune import forecast
from nvit.prune.pruner import Pruner
from nvit.selection.curves import Curve
from nvit.structure.masks import kept_counts
from tests.runs import arguments, same

ONE_SHOT = {"train": False, "refit": True, "cost": "measured", "bundle_mlp": 4, "bundle_emb": 4, "latency_target": 0.7}


def run(**more):
    model, data, settings, times = arguments(**(ONE_SHOT | more))
    return prune(model, data, settings, times)


def test_costs_are_measured_once_and_a_run_is_the_same_again():
    result = run(latency_target=(0.8, 0.7), rounds=2)
    assert [row["cost_seconds"] > 0 for row in result.history] == [True] * 4
    assert len({row["cost_seconds"] for row in result.history}) == 1
    assert [s.predicted_ratio <= s.target for s in result.snapshots] == [True, True]
    assert same(result.masks, run(latency_target=(0.8, 0.7), rounds=2).masks)


def test_the_curves_decide_and_the_scores_order():
    """A group measured to be dear stays whole, though its scores are the lowest; of others the first units leave."""
    model, _, settings, times = arguments(
        train=False, criterion="fisher", latency_target=0.9, only=("mlp",), bundle_mlp=4
    )
    pruner = Pruner(model, times, settings, timer=None)
    draw = torch.Generator().manual_seed(0)
    scores = {g.name: torch.rand(g.size, generator=draw) for g in pruner.free}
    dear, cheap = (g.name for g in pruner.free)
    scores[dear] *= 1e-6
    pruner.scores = lambda: dict(scores)
    half = {g.name: (g.size // 2,) for g in pruner.free}
    curves = {dear: Curve(half[dear], (1e3,)), cheap: Curve(half[cheap], (1e-3,))}
    asked = []
    pruner.decide_at(0.9, lambda found: (asked.append(found), curves)[1])
    kept = kept_counts(pruner.masks)
    assert kept[dear] == len(scores[dear])
    gone = ~pruner.masks[cheap]
    assert gone.any() and scores[cheap][gone].max() < scores[cheap][~gone].min()
    assert len(asked) == 1 and same(asked[0], scores)

    values, tensors = pruner.state()
    again = Pruner(arguments()[0], times, settings, timer=None)
    again.restore(values, tensors)
    assert again.curves == curves


def priced_apart():
    """A pruner of two groups, of which the first leaves first by its scores and last by what was measured."""
    model, _, settings, times = arguments(
        train=False, criterion="fisher", latency_target=0.9, only=("mlp",), bundle_mlp=4
    )
    pruner = Pruner(model, times, settings, timer=None)
    first, second = (g.name for g in pruner.free)
    draw = torch.Generator().manual_seed(0)
    scores = {g.name: torch.rand(g.size, generator=draw) for g in pruner.free}
    scores[first] *= 1e-6
    pruner.scores = lambda: dict(scores)
    half = {g.name: (g.size // 2,) for g in pruner.free}
    curves = {first: Curve(half[first], (1e3,)), second: Curve(half[second], (1e-3,))}
    return pruner, first, lambda _: curves


def test_of_all_choices_the_nearest_to_the_dense_model_is_taken():
    """A judge that wants so many hidden units of the first block; the row says what it said."""
    kept = {}
    for way in ("predicted", "between", "measured"):
        pruner, first, measure = priced_apart()
        wanted = int(pruner._least(pruner.ways(measure)[way], 0.9)[0][first].sum())
        pruner.decide_at(0.9, None, lambda masks, n=wanted, f=first: abs(float(masks[f].sum()) - n))
        row = pruner.history[-1]
        kept[way] = int(pruner.masks[first].sum())
        assert row["cost"] == way and kept[way] == wanted
        assert row[f"distance_{way}"] == 0
        assert all(row[f"distance_{other}"] > 0 for other in {"predicted", "between", "measured"} - {way})
    assert kept["predicted"] < kept["between"] < kept["measured"] == pruner.masks[first].numel()


def test_between_prices_are_the_geometric_mean_and_keep_the_order():
    pruner, _, measure = priced_apart()
    ways = pruner.ways(measure)
    for name, score in pruner.scores().items():
        measured, found = ways["measured"].units[name], ways["between"].units[name]
        torch.testing.assert_close(found.square(), score.double() * measured)
        assert same({name: found.argsort()}, {name: score.argsort()})


def test_a_run_takes_the_nearest_of_all_choices():
    both = run(cost="both")
    (row,) = both.history
    distances = {way: row[f"distance_{way}"] for way in ("predicted", "between", "measured")}
    assert min(distances.values()) == distances[row["cost"]] > 0
    if row["cost"] != "between":
        assert same(both.masks, run(cost=row["cost"]).masks)


def test_measured_costs_are_those_of_a_refitted_model():
    with pytest.raises(ValueError, match="cost measured is that of a refitted model; add --refit"):
        PruneConfig(train=False, cost="measured").check()


def test_a_plan_counts_the_measuring_once_whatever_the_targets(monkeypatch):
    """Seconds of rehearsals are held: what is left is arithmetic."""
    model, data, settings, times = arguments(**ONE_SHOT | {"images": 0, "latency_target": (0.8, 0.5)})
    taken = iter([(9.0, 50), (1.4 + 2.0, 100), (1.8 + 3.0, 160)])  # warm-up; two batches of 4 and of 8
    measuring = iter([2.0, 3.0])  # 1 s beside, 0.125 an image
    ran = lambda *_: SimpleNamespace(history=[{"cost_seconds": next(measuring)}])  # noqa: E731
    monkeypatch.setattr(forecast, "prune", ran)
    monkeypatch.setattr(forecast, "score", lambda *_: None)
    monkeypatch.setattr(forecast.Watch, "of", lambda self, work: (work(), next(taken))[1])
    monkeypatch.setattr(forecast, "_first_batch", lambda *_: ((None, None), 0.0))
    monkeypatch.setattr(forecast, "_cut", lambda batch, span: torch.zeros(1, 3, 16, 16))
    (stage,) = forecast.forecast_one_shot(model, data, settings, times).stages
    assert stage.seconds == pytest.approx(2 * (1.0 + 40 * 0.05) + 1.0 + 40 * 0.125)
    assert stage.name == "score, measure costs, decide, refit"


def test_a_run_of_both_says_which_was_chosen(capsys):
    found = {"model": "m", "dense": {}, "snapshots": [], "seconds": 9.0}
    found |= {
        "latency_batch": 1,
        "latency_dtype": "float32",
        "latency_mode": "eager",
        "runtime": "torch",
        "device": "cpu",
    }
    found |= {"cost_seconds": 5.0, "chosen_by": ["predicted", "measured"], "refit_seconds": 2, "refit_peak_memory": 3e6}
    tell(SimpleNamespace(out="run"), found)
    assert "costs measured in 5 s, nearest choice by prices predicted, measured, refit: 2 s" in capsys.readouterr().out
