"""Random widths, their predicted and measured latency on a clock that is known, and the command."""

import csv
import json

import pytest
import torch

from nvit import LatencyTable
from nvit.analysis import prediction
from nvit.cli import main as cli
from nvit.latency.measure import sample_images
from nvit.structure import snapshot
from tests.hosts import prepared


def test_random_masks_leave_whole_bundles_of_every_group_and_come_from_the_generator():
    _, groups = prepared("plain")
    shares = []
    for seed in range(20):
        masks = prediction.random_masks(groups, torch.Generator().manual_seed(seed))
        again = prediction.random_masks(groups, torch.Generator().manual_seed(seed))
        assert all(torch.equal(masks[g.name], again[g.name]) for g in groups)
        kept = {g.name: int(masks[g.name].sum()) for g in groups}
        assert all(k == g.size or (k and k % g.multiple == 0) for g, k in ((g, kept[g.name]) for g in groups))
        shares.append(sum(kept.values()) / sum(g.size for g in groups))
    assert min(shares) < 0.5 < 0.75 < max(shares), "models of all latencies"


def test_rows_compare_the_tables_word_with_the_clocks(monkeypatch):
    """The clock says 1.1 times what the table does."""
    model, _ = prepared("plain")
    table = LatencyTable.analytic(model)

    def clock(models, images, seconds, mode, runtime):
        assert models[0] is model and seconds == 0.5 and images.shape[0] == 2
        ratio = 1.1 * table.ratio(snapshot.spec_of(models[1]).blocks)
        return [{}, {"measured_ratio": ratio, "measured_spread": 0.01, "latency_ms": 1.0}]

    monkeypatch.setattr(prediction, "measured", clock)
    rows = prediction.predicted_and_measured(model, table, sample_images(model, 2), count=4, seconds=2.0)
    assert len({r["predicted_ratio"] for r in rows}) == 4
    assert all(r["error"] == pytest.approx(1 / 1.1 - 1) for r in rows)
    assert prediction.errors(rows)["median"] == pytest.approx(100 - 100 / 1.1)


def test_errors_are_of_sizes_and_the_mean_of_signs():
    found = prediction.errors([{"error": e} for e in (0.02, -0.04, 0.06)])
    assert found == pytest.approx({"mean": 4 / 3, "median": 4, "p90": 5.6, "largest": 6})


def test_command_on_the_digits(tmp_path, capsys):
    args = ["--count", "3", "--seconds", "0.6", "--latency-seconds", "1", "--latency-batch", "4", "--device", "cpu"]
    assert cli.main(["analyze", "latency", "digits", *args, "--out", str(tmp_path)]) == 0
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "result.json").read_text())
    assert "3 models of random widths; the table is off by" in shown and found["models"] == 3
    with (tmp_path / "latency.csv").open() as f:
        rows = [{k: float(v) for k, v in r.items()} for r in csv.DictReader(f)]
    assert len(rows) == 3 and (tmp_path / "latency.png").stat().st_size > 1000
    for r in rows:
        assert r["error"] == pytest.approx(r["predicted_ratio"] / r["measured_ratio"] - 1)
        assert 0 < r["predicted_ratio"] <= 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--count", "0"], "count is 0; it must be at least 1"),
        (["--table", "analytic"], "table is analytic, which counts and measures nothing"),
    ],
)
def test_wrong_input_is_one_clear_line(args, says, capsys):
    assert cli.main(["analyze", "latency", "digits", *args]) == 2
    assert says in capsys.readouterr().err
