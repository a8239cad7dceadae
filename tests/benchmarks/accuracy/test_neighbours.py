"""The settings of published neighbours on a tiny model, and rows that are measured once."""

import copy

import pytest
import timm
import torch

from benchmarks import harness
from benchmarks.accuracy import neighbours
from benchmarks.accuracy.library import Bench, answers
from benchmarks.accuracy.paired import answered
from benchmarks.accuracy.published import QUOTES
from benchmarks.accuracy.rows import Resumed, rows_of
from nvit import adapters
from nvit.latency.table import LatencyTable
from nvit.snapshot import spec_of


class TinyBench(Bench):
    """The bench of a tiny model that knows random images apart."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.plain = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=2, num_classes=5).eval()
        adapters.find(self.plain).prepare(self.plain)
        images = torch.randn(3, 8, 3, 64, 64)
        self.calibration = [(x, self.plain(x).argmax(-1)) for x in images]
        self.evaluation = self.calibration[:2]
        self.table = LatencyTable.analytic(self.plain)
        self.groups = adapters.find(self.plain).groups(self.plain)
        self.dense = answers(self.plain, self.evaluation)
        self.model, self.seen = self.rotated(self.calibration)


@pytest.fixture(scope="module")
def bench():
    return TinyBench()


def test_a_setting_takes_its_share_of_each_kind(bench):
    scores = {g.name: torch.rand(g.size) for g in bench.groups}
    for shares in (s for s in neighbours.SETTINGS.values() if "tokens" not in s):
        masks = neighbours.chosen(bench, scores, shares)
        for kind in {g.kind for g in bench.groups}:
            mine = [masks[g.name] for g in bench.groups if g.kind == kind]
            units, left = sum(map(len, mine)), sum(int(m.sum()) for m in mine)
            assert left == units - round(shares.get(kind, 0) * units), (shares, kind)


def test_hidden_units_without_variance_leave_their_mean_behind(bench):
    """Units that say the same of every image leave without a trace."""
    constant = copy.copy(bench)
    constant.model = copy.deepcopy(bench.model)
    with torch.no_grad():
        for block in constant.model.blocks:
            block.mlp.fc1.weight[: block.mlp.fc1.out_features // 2] = 0
            block.mlp.fc1.bias += 1.0
    constant.plain = constant.model
    constant.seen = constant.rotated(constant.calibration)[1]
    small, x = neighbours.by_variance(constant, 0.5), bench.evaluation[0][0]
    assert {b.mlp for b in spec_of(small).blocks} == {96}
    torch.testing.assert_close(small(x), constant.model(x), rtol=0, atol=1e-4)


def test_rows_are_measured_once_and_stand_beside_the_published(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    labelled = [(x, y) for x, y in bench.calibration]
    rows = Resumed("neighbours", ("setting", "method"))
    table = neighbours.Neighbours(bench, rows, labelled, bench.evaluation)
    heads = "35 % of MLP, 20 % of heads"
    monkeypatch.setitem(neighbours.SETTINGS, "16 tokens a block", {"tokens": 3})  # of 16 patches
    monkeypatch.setitem(neighbours.SETTINGS, "12 tokens a block", {"tokens": 2})
    monkeypatch.setitem(neighbours.SETTINGS, "8 tokens a block", {"tokens": 1})
    for setting in ("half of MLP", heads, "16 tokens a block"):
        table.measure(setting)
    found = {(r["setting"], r["method"]): r for r in rows_of(tmp_path / "neighbours_cpu.csv")}
    here = [m for _, m in found if m not in {q.method for q in QUOTES}]
    assert sorted(here) == ["VBP's rule, here", "nvit", "nvit", "nvit", "nvit, widths too"]
    ours = found["half of MLP", "nvit"]
    assert float(ours["retention"]) == pytest.approx(sum(answered(ours["right"], 16)) / 16)
    assert float(ours["low"]) <= float(ours["retention"]) <= float(ours["high"])
    theirs = found["half of MLP", "CORP"]
    assert theirs["published"] == "True" and float(theirs["retention"]) == pytest.approx(55.37 / 72.02, abs=1e-4)
    assert found[heads, "nvit"]["knn"] and not ours["knn"]
    both, merged = (float(found["16 tokens a block", m]["macs"]) for m in ("nvit, widths too", "nvit"))
    assert both == pytest.approx(merged, abs=0.06) and both <= merged

    again = neighbours.Neighbours(bench, Resumed("neighbours", ("setting", "method")), None, None)
    monkeypatch.setattr(neighbours, "answers", None)
    again.measure(heads)
    assert rows_of(tmp_path / "neighbours_cpu.csv") == list(found.values())


def test_quotes_say_where_they_stand():
    assert all(q.setting in neighbours.SETTINGS and 0 < q.top1 < q.dense for q in QUOTES)
    assert all("arXiv" in q.source or "repository" in q.source for q in QUOTES)
