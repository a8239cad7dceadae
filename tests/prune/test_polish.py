"""Steps after a refit: answers come nearer to the dense model's, or the weights stay."""

import copy

import pytest
import torch
from torch.nn.functional import interpolate

import nvit
from nvit import PruneConfig, adapters, tasks
from nvit.latency.table import LatencyTable
from nvit.prune import polish
from nvit.prune.folder import RunFolder
from nvit.prune.sample import fitted, fitted_count, held_back, sampled
from nvit.structure import snapshot
from nvit.structure.compact import compact
from nvit.structure.masks import full_masks
from nvit.tasks.nearness import Nearness
from tests.families import HOSTS
from tests.hosts import make

ONE_SHOT = {
    "train": False,
    "refit": True,
    "cost": "predicted",
    "bundle_heads": 1,
    "bundle_emb": 4,
    "measure_seconds": 0.0,
}


def batches(count=5):
    """Of four images, with noise, so that what is learnt on some holds for others."""
    draw = torch.Generator().manual_seed(0)
    four = interpolate(torch.randn(4, 3, 4, 4, generator=draw), 32, mode="bilinear")
    return [four + 0.2 * torch.randn(four.shape, generator=draw) for _ in range(count)]


def host():
    """Sure of its answers, so that what pruning changes shows in them."""
    model = make("plain", img_size=32)
    with torch.no_grad():
        model.head.weight.mul_(30)
    return model


def run(out=None, progress=False, **more):
    model = host()
    config = PruneConfig(**(ONE_SHOT | {"latency_target": (0.8, 0.5), "polish": 30} | more))
    table = LatencyTable.analytic(model, config.bundle_sizes)
    return nvit.prune(model, batches(), config, table, out=out, progress=progress)


def test_answers_come_nearer_on_images_held_back_and_no_label_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(polish, "LOOK", 10)
    monkeypatch.setattr(polish, "RATE", 1e-4)
    plain, polished = run(polish=0), run(out=tmp_path)
    rows = [row for row in polished.history if "polish_after" in row]
    assert [row["target"] for row in rows] == [0.8, 0.5]
    config, dense = PruneConfig(**ONE_SHOT), host()
    near = Nearness(tasks.of("auto", dense), dense, held_back(batches(), config, fitted_count(batches(), config)))
    for before, after, row in zip(plain.snapshots, polished.snapshots, rows, strict=True):
        assert row["polish_before"] == pytest.approx(near.of(before.model), rel=1e-3)
        assert row["polish_after"] == pytest.approx(near.of(after.model), rel=1e-6)
        assert row["polish_after"] <= row["polish_before"]
        assert after.predicted_ratio == before.predicted_ratio
        loaded = snapshot.load(tmp_path / f"target-{after.target:g}")
        assert near.of(loaded) == pytest.approx(row["polish_after"], rel=1e-6)
        assert snapshot.load_metrics(tmp_path / f"target-{after.target:g}")["polished_steps"] == 30
    assert rows[-1]["polish_after"] < 0.8 * rows[-1]["polish_before"] and rows[-1]["polish_best"] in (10, 20, 30)


def test_weights_stay_where_no_step_is_nearer(monkeypatch):
    monkeypatch.setattr(polish, "RATE", 1.0)
    plain, spoilt = run(polish=0, latency_target=0.7), run(polish=3, latency_target=0.7)
    assert spoilt.history[-1]["polish_best"] == 0
    assert spoilt.history[-1]["polish_after"] == spoilt.history[-1]["polish_before"]
    for a, b in zip(plain.model.parameters(), spoilt.model.parameters(), strict=True):
        assert torch.equal(a, b) and b.grad is None


def test_what_is_polished_is_not_polished_again():
    result = run(polish=3, latency_target=0.7)
    kept = [p.clone() for p in result.model.parameters()]
    config = PruneConfig(**ONE_SHOT, polish=3)
    folder = RunFolder()
    assert polish.polish_snapshots(result.snapshots, result.dense, batches(), config, folder) == []
    assert all(torch.equal(a, b) for a, b in zip(kept, result.model.parameters(), strict=True))


def test_zoomed_parts_lie_inside_and_repeat_by_their_draw():
    x = torch.linspace(-1, 1, 24)[None, None, None, :].expand(8, 3, 16, 24)
    one, two = (polish.zoomed(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == x.shape
    assert float(one.abs().max()) <= 1 + 1e-6
    spans = one[:, 0, 0, -1] - one[:, 0, 0, 0]
    assert (spans < 0).any() and (spans > 0).any(), "some are mirrored"
    assert spans.abs().max() <= 2 + 1e-6 and spans.abs().min() >= 2 * polish.ZOOM**0.5 - 0.3
    assert len({round(float(s), 4) for s in spans}) > 4


def test_images_are_dealt_as_a_refit_deals_them():
    config = PruneConfig(**ONE_SHOT)
    count = fitted_count(batches(), config)
    mine, others = list(fitted(batches(), config, count)), held_back(batches(), config, count)
    assert len(mine) == 4 and len(others) == 1
    assert torch.equal(torch.cat([*mine, *others]), torch.cat(list(sampled(batches(), config))))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"refit": False, "polish": 5}, "polish 5 follows a refit; add --refit"),
        ({"polish": -1}, "polish is -1; it must be at least 1, or 0 for none"),
    ],
)
def test_what_makes_no_sense_is_refused(more, words):
    with pytest.raises(ValueError, match=words):
        PruneConfig(**(ONE_SHOT | more)).check()


@pytest.mark.parametrize("name", HOSTS)
def test_every_family_is_polished_by_its_tokens(name):
    dense = adapters.find(model := HOSTS[name]()).prepare(model).eval().requires_grad_(False)
    small = copy.deepcopy(dense).requires_grad_(True)
    with torch.no_grad():
        for p in small.parameters():
            p.add_(0.02 * torch.randn_like(p))
    x = torch.randn(4, *adapters.preprocess(dense)["input_size"], generator=torch.Generator().manual_seed(0))
    towards = polish.Towards(tasks.of("auto", dense), small, dense, x)
    loss = towards.of_logits(towards.call(small, x), x, None)
    loss.backward()
    assert towards.tokens and 0 < float(loss.detach()) < 10 and any(p.grad is not None for p in small.parameters())
    assert float(towards.of_logits(towards.call(dense, x), x, None)) == 0


def test_where_streams_differ_in_width_answers_are_met():
    dense, x = host(), batches()[0]
    groups = adapters.find(dense).groups(adapters.find(dense).prepare(dense))
    emb = next(g for g in groups if g.kind == "emb")
    masks = full_masks(groups)
    masks[emb.name][:8] = False
    towards = polish.Towards(tasks.of("auto", dense), compact(dense, groups, masks), dense, x)
    assert not towards.tokens
    assert float(towards.of_logits(towards.call(dense, x), x, None)) == pytest.approx(0, abs=1e-6)
