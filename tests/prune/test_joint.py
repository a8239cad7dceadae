"""Widths and tokens together: targets are met, the nearest candidate wins, and what was measured corrects the aim."""

import json

import numpy as np
import pytest
import torch

import nvit
from nvit import PruneConfig, adapters, tasks
from nvit.analysis.compare import predicted_ratio
from nvit.analysis.evaluate import macs
from nvit.calibration.coarse import coarser
from nvit.cli import main as cli
from nvit.latency.clock import current_setting
from nvit.latency.table import LatencyTable
from nvit.prune import joint, oneshot
from nvit.prune.sample import fitted_count, held_back
from nvit.report.read import read
from nvit.structure import snapshot
from nvit.structure.masks import full_masks
from nvit.tasks.nearness import Nearness
from tests.families import HOSTS
from tests.hosts import make

SIZE = (3, 32, 32)  # 16 patches
ONE_SHOT = {
    "train": False,
    "refit": True,
    "cost": "predicted",
    "only": ("widths", "tokens"),
    "bundle_heads": 1,
    "bundle_emb": 4,
}


def host(**more):
    return make("plain", img_size=32, depth=3, **more)


def batches():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(4, *SIZE, generator=draw) for _ in range(5)]


def run(model=None, table=None, out=None, resume=False, timer=None, **more):
    model = host() if model is None else model
    config = PruneConfig(**(ONE_SHOT | {"latency_target": (0.8, 0.5), "measure_seconds": 0.0} | more))
    table = table or LatencyTable.analytic(model, config.bundle_sizes)
    more = {} if timer is None else {"timer": timer}
    return nvit.prune(model, batches(), config, table, out=out, resume=resume, **more)


@torch.no_grad()
def logits(model, x):
    return model.eval()(x)


def test_both_targets_are_met_by_the_nearest_candidates(tmp_path):
    model, whole, x = host(), macs(host(), SIZE), batches()[0]
    result = run(model, out=tmp_path, only=("mlp", "tokens"), latency_target=(0.8, 0.55))
    for pruned in result.snapshots:
        assert pruned.predicted_ratio <= pruned.target
        # What the counter sees besides: the similarities of every merge.
        assert macs(pruned.model, SIZE) / whole == pytest.approx(pruned.predicted_ratio, rel=0.02)
        rows = [row for row in result.history if row.get("target") == pruned.target]
        best = min(rows, key=lambda row: row["distance"])
        assert pruned.metrics["distance"] == best["distance"] and pruned.metrics["schedule"] == best["schedule"]
        assert len({row["widths_ratio"] for row in rows}) > 1, "widths were tried beneath merged tokens"
        loaded = snapshot.load(tmp_path / f"target-{pruned.target:g}")
        assert torch.equal(logits(loaded, x), logits(pruned.model, x))
        assert snapshot.load_metrics(tmp_path / f"target-{pruned.target:g}")["tokens"] == pruned.metrics["tokens"]
        assert predicted_ratio(result.table, loaded) == pytest.approx(pruned.predicted_ratio)
    last = result.snapshots[-1].model
    assert any(adapters.merges(last)) and adapters.merges(model) == adapters.merges(last)
    torch.testing.assert_close(logits(model, x), logits(last, x), rtol=0, atol=1e-5)


def test_candidates_are_judged_on_sharp_images_and_on_coarse_ones():
    """A distance is the mean over both."""
    model, config = host(), PruneConfig(**ONE_SHOT)
    (pruned,) = run(latency_target=0.6).snapshots
    held = held_back(batches(), config, fitted_count(batches(), config))
    sharp, coarse = (
        Nearness(tasks.of("auto", model), model, images).of(pruned.model) for images in (held, [*coarser(held, 1.0)])
    )
    assert pruned.metrics["distance"] == pytest.approx((sharp + coarse) / 2, rel=1e-4) and sharp != coarse


def test_tokens_alone_leave_every_weight_as_it_was():
    dense = host()
    before = {n: p.clone() for n, p in dense.named_parameters()}
    (pruned,) = run(dense, only=("tokens",), latency_target=0.7).snapshots
    assert pruned.metrics["widths_ratio"] == 1 and pruned.metrics["tokens"][0] == 17 > pruned.metrics["tokens"][-1]
    for n, p in pruned.model.named_parameters():
        assert torch.equal(p, before[n])


def test_going_on_ends_where_narrower_widths_help_no_more(monkeypatch):
    seen = []
    monkeypatch.setattr(joint.Nearness, "of", lambda self, model: seen.append(model) or 1.0 + len(seen))
    result = run(latency_target=0.7)
    tried = {row["widths_ratio"] for row in result.history if "widths_ratio" in row}
    assert len(tried) == 2 and max(tried) == 1 and 0.75 < min(tried) < 0.95, "merging alone, and to 0.8 with widths"
    assert result.snapshots[0].metrics["widths_ratio"] == 1.0
    assert all(bool(keep.all()) for keep in result.masks.values())


class Clock:
    """Milliseconds that are multiply-accumulates, and for every block that merges some more."""

    def __init__(self) -> None:
        self.readings = []

    def __call__(self, models, images, seconds, mode, **_):
        took = [macs(m, SIZE) / 1e6 + 0.02 * sum(r > 0 for r in adapters.merges(m)) for m in models]
        self.readings.append([t / took[0] for t in took[1:]])
        return np.array([took] * 3)


def test_what_merging_takes_is_measured_and_the_aim_corrected():
    model = host()
    counted = LatencyTable.analytic(model, PruneConfig(**ONE_SHOT).bundle_sizes)
    setting = current_setting("cpu", torch.float32, 4, 17)
    table = LatencyTable(counted.parts, counted.grids, counted.dense, setting)
    clock = Clock()
    result = run(model, table, only=("mlp", "tokens"), latency_target=0.65, measure_seconds=1.0, timer=clock)
    (pruned,) = result.snapshots
    assert len(clock.readings[0]) == 1, "at the one share that three blocks reach"
    assert any(adapters.merges(pruned.model))
    assert pruned.met and pruned.reading.measured == clock.readings[-1][0]
    assert pruned.reading.measured == pytest.approx(pruned.predicted_ratio, rel=0.05)
    assert 0.55 < pruned.reading.measured <= 0.65 + pruned.reading.spread
    assert predicted_ratio(table, pruned.model) is None, "a table of widths has no word on merged tokens"


def test_a_finished_run_is_there_again(tmp_path, monkeypatch):
    found = run(out=tmp_path)
    monkeypatch.setattr(joint, "Walk", lambda *_: pytest.fail("walked again"))
    model, x = host(), batches()[0]
    again = run(model, out=tmp_path, resume=True)
    assert [p.metrics["tokens"] for p in again.snapshots] == [p.metrics["tokens"] for p in found.snapshots]
    for mine, theirs in zip(again.snapshots, found.snapshots, strict=True):
        assert torch.equal(logits(mine.model, x), logits(theirs.model, x))
    torch.testing.assert_close(logits(model, x), logits(again.model, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"train": True, "refit": False}, "only tokens: how many merge is chosen without training; add --no-train"),
        ({"refit": False, "budget": "8GB"}, "budget 8GB does not bound the choice of tokens"),
        ({"rounds": 2}, "rounds 2: with tokens"),
        ({"only": ("tokens",), "freeze": ("tokens",)}, "nothing is left to prune with only=..tokens.., freeze="),
        ({"only": ("tokens",), "latency_target": 0.1}, r"target 0\.1 of dense cannot be met: .* and the fewest tokens"),
        ({"only": ("token",)}, r"unknown value 'token' \(did you mean 'tokens'\?\)"),
    ],
)
def test_what_forbids_it_is_said(more, says):
    with pytest.raises(ValueError, match=says):
        run(**more)


def test_a_refit_sees_coarser_images_where_that_is_asked_for():
    only, x = ("mlp",), batches()[0]
    sharp, coarse, again = (logits(run(only=only, latency_target=0.7, coarse=c).model, x) for c in (0.0, 0.9, 0.9))
    assert torch.equal(coarse, again) and (sharp - coarse).abs().max() > 1e-3
    unsaid, half = (logits(run(only=only, latency_target=0.7, coarse=c).model, x) for c in (-1.0, 0.5))
    assert torch.equal(unsaid, sharp) and not torch.equal(half, sharp), "none without tokens"


def test_half_of_the_images_are_coarse_where_tokens_merge(monkeypatch):
    shares = []
    monkeypatch.setattr(oneshot, "coarser", lambda images, share, seed: shares.append(share) or images)
    run(only=("mlp", "tokens"), latency_target=0.5)
    assert shares and set(shares) == {0.5}
    shares.clear()
    run(only=("mlp", "tokens"), latency_target=0.5, coarse=0.0)
    assert not shares


def test_frozen_tokens_are_as_if_nobody_had_named_them():
    config = PruneConfig(**ONE_SHOT | {"freeze": ("tokens",)})
    assert not config.merges_tokens and config.width_kinds == ("emb", "heads", "qk_dim", "v_dim", "mlp")
    result = run(freeze=("tokens",), latency_target=0.8)
    assert adapters.merges(result.model) == () and "tokens" not in result.snapshots[0].metrics
    assert PruneConfig(only=("mlp", "tokens")).width_kinds == ("mlp",)


def test_who_cannot_merge_and_what_needs_every_token_is_refused():
    config = PruneConfig(**ONE_SHOT)
    swin = next(make_ for name, make_ in HOSTS.items() if name.startswith("swin"))()
    with pytest.raises(ValueError, match=r"only tokens: .*windows.* Leave out tokens"):
        nvit.prune(swin, batches(), config)
    with pytest.raises(ValueError, match="task segmentation answers for every place"):
        tasks.TASKS["segmentation"](3).check(config)
    with pytest.raises(ValueError, match="features tokens is about each of them"):
        tasks.TASKS["features"](0).check(PruneConfig(**ONE_SHOT, features="tokens"))
    tower = host()
    tower.reset_classifier(0, "")
    with pytest.raises(ValueError, match="about every place of an image"):
        run(tower, latency_target=0.8)


def test_features_of_a_tower_are_kept_as_well():
    tower = host()
    tower.reset_classifier(0)
    (pruned,) = run(tower, only=("tokens",), latency_target=0.7).snapshots
    assert 0 < pruned.metrics["distance"] < 2 and pruned.predicted_ratio <= 0.7


def test_the_command_says_how_many_tokens_are_left(tmp_path, capsys):
    words = ["--no-train", "--only", "tokens", "--latency-target", "0.7", "--table", "analytic", "--device", "cpu"]
    quick = ["--images", "32", "--batch-size", "16", "--eval-images", "20", "--latency-seconds", "0.2"]
    out = str(tmp_path / "run")
    assert cli.main(["prune", "digits", *words, *quick, "--latency-batch", "4", "--out", out]) == 0
    assert "17 → " in (shown := capsys.readouterr().out) and "tokens" in shown
    (row,) = json.loads((tmp_path / "run/result.json").read_text())["snapshots"]
    assert len(row["tokens"]) == 5 and row["tokens"][0] == 17 > row["tokens"][-1] and row["met"]
    assert cli.main(["analyze", "widths", out, "--out", str(tmp_path / "w")]) == 0
    rows = json.loads((tmp_path / "w/result.json").read_text())["widths"]
    assert [r["tokens"] for r in rows] == row["tokens"][1:]
    model = nvit.load(row["path"])
    groups = adapters.find(model).groups(model)
    assert adapters.merges(model) and full_masks(groups)
    assert len(read(tmp_path / "run").history) == 1, "candidates are no decisions"
    assert cli.main(["report", out]) == 0
    text = (tmp_path / "run/report.html").read_text()
    assert f"{row['tokens'][-1]} of 17 leave the last one" in text
    assert f"tokens behind each block {' '.join(map(str, row['tokens'][1:]))}, of 17" in text


def test_of_three_ways_to_price_the_nearest_choice_is_refitted(monkeypatch):
    seen = {}

    def distance(self, masks):
        seen[len(seen)] = sum(int(m.sum()) for m in masks.values())
        return float(len(seen))

    monkeypatch.setattr(oneshot.Refitter, "distance", distance)
    result = run(latency_target=0.6, cost="both")
    rows = [row for row in result.history if "refit_seconds" in row]
    assert rows and all(
        row["cost"] == "predicted" and row["distance_measured"] > row["distance_predicted"] for row in rows
    )
    assert len(seen) == 3 * len(rows)


@pytest.mark.parametrize("flattered", [1.0, 1e9])
def test_narrower_widths_have_to_be_nearer_by_a_factor(monkeypatch, flattered):
    """A distance by which the narrower is the nearer, if not by that factor, keeps the widths whole."""
    monkeypatch.setattr(joint, "FLATTERED", flattered)
    monkeypatch.setattr(joint, "EXCHANGES", 0)
    monkeypatch.setattr(
        joint.Walk, "_distance", lambda self, model, merges: float(sum(map(torch.numel, model.parameters())))
    )
    result = run(latency_target=0.6)
    looked = [row["widths_ratio"] for row in result.history if row.get("candidate")]
    assert len(set(looked)) > 1
    assert result.snapshots[0].metrics["widths_ratio"] == (max if flattered > 1 else min)(looked)
