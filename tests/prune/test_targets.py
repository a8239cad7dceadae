"""Targets in ms and images per second: the fraction the table gives them, and a line where there is none."""

import json
import re

import pytest
import torch

import nvit
from nvit.cli import main as cli
from nvit.latency.clock import current_setting
from nvit.latency.grid import Grid
from nvit.latency.table import LatencyTable
from nvit.prune.targets import fractions
from nvit.spec import BlockWidths
from tests.hosts import prepared
from tests.runs import config, table

BATCH = 8


@pytest.fixture
def run():
    """A dense model, its table in ms of a batch of eight, and the settings."""
    model, _ = prepared("plain")
    settings = config()
    found = table(model, settings)
    found.setting = current_setting("cpu", torch.float32, BATCH, 5)
    return model, found, settings


def test_a_fraction_is_that_of_the_dense_latency_rounded_down(run):
    model, found, settings = run
    dense = found.dense_ms
    assert fractions(model, found, settings, [0.8 * dense, 0.50004 * dense]) == (0.8, 0.5)
    assert fractions(model, found, settings, (), [1e3 * BATCH / (0.4 * dense)]) == (0.4,)
    both = fractions(model, found, settings, [0.7 * dense], [2 * 1e3 * BATCH / dense])
    assert both == (0.7, 0.5), "twice the throughput is half the latency"


@pytest.mark.parametrize("above", [1.0, 1.5])
def test_what_the_dense_model_meets_already_is_refused(run, above):
    model, found, settings = run
    ms = above * found.dense_ms * (1 + 1e-9)
    with pytest.raises(ValueError, match=rf"latency_ms {ms:g} is met without pruning: the dense model takes"):
        fractions(model, found, settings, [ms])
    with pytest.raises(ValueError, match=r"images_per_second .* is met without pruning: .* images/s"):
        fractions(model, found, settings, (), [1e3 * BATCH / ms])


def test_what_no_pruning_reaches_is_refused_and_limits_count(run):
    model, found, settings = run
    least = found.model_ms([BlockWidths(16, 1, 8, 8, 16)] * 2)
    fraction = least / found.dense_ms
    assert fractions(model, found, settings, [1.01 * least])[0] == pytest.approx(1.01 * fraction, abs=1e-4)
    message = (
        rf"latency_ms .* cannot be met: the smallest model that pruning may leave takes {re.escape(f'{least:.3g}')} ms"
    )
    with pytest.raises(ValueError, match=message):
        fractions(model, found, settings, [0.99 * least])
    with pytest.raises(ValueError, match="cannot be met"):
        fractions(model, found, config(only=("mlp",)), [1.01 * least])


def test_a_table_that_counts_has_no_milliseconds(run):
    model, found, settings = run
    found.setting = None
    with pytest.raises(ValueError, match="need a table that was measured; this one counts multiply-accumulates"):
        fractions(model, found, settings, [1.0])


MEASURED = ["--model", "digits", "--latency-batch", "4", "--latency-seconds", "0.3", "--device", "cpu"]
QUICK = ["prune", *MEASURED, "--no-train", "--criterion", "magnitude", "--eval-images", "32", "--measure-seconds", "0"]


def test_the_command_takes_images_per_second_and_meets_them_by_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NVIT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "table"
    assert cli.main(["latency", *MEASURED, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    dense = json.loads((out / "result.json").read_text())["dense_ms"]
    assert f"{4e3 / dense:.1f} images/s" in printed and "float32, eager, batch 4" in printed

    # A measured table of so small a model may be flat on a busy machine: its setting, and times that follow the work.
    measured = LatencyTable.load(out / "latency_table.json")
    work = LatencyTable.analytic(nvit.load(nvit.BUNDLED))
    scale = dense / work.dense_ms
    grids = {name: Grid(g.kinds, g.axes, g.values * scale) for name, g in work.grids.items()}
    LatencyTable(work.parts, grids, work.dense, measured.setting).save(out / "latency_table.json")

    given = ["--table", str(out / "latency_table.json"), "--out", str(tmp_path / "run")]
    assert cli.main([*QUICK, *given, "--images-per-second", f"{1.25 * 4e3 / dense}"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (snapshot,) = result["snapshots"]
    assert snapshot["target"] == pytest.approx(0.8, abs=2e-4) and snapshot["predicted_ratio"] <= snapshot["target"]
    assert snapshot["images_per_s"] == pytest.approx(4e3 / snapshot["latency_ms"])
    assert result["dense"]["images_per_s"] == pytest.approx(4e3 / result["dense"]["latency_ms"])
    assert (result["latency_mode"], result["latency_dtype"]) == ("eager", "float32")
    assert "images/s" in capsys.readouterr().out

    again = tmp_path / "again"
    for flags, said in (
        (["--latency-ms", f"{2 * dense}"], "is met without pruning"),
        (["--latency-ms", f"{1e-3 * dense}"], "cannot be met"),
    ):
        assert cli.main([*QUICK, *given[:2], "--out", str(again), *flags]) == 1
        assert said in (line := capsys.readouterr().err.strip().splitlines()[-1]) and line.startswith("nvit: ")
    assert not again.exists(), "something was written before the target was refused"


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--latency-ms", "-1"], 2, "latency_ms -1 is not a positive number"),
        (["--images-per-second", "0"], 2, "images_per_second 0 is not a positive number"),
        (["--latency-ms", "3", "--latency-target", "0.7"], 2, "latency_ms stands in place of latency_target"),
        (["--latency-ms", "3", "--table", "analytic"], 1, "need a table that was measured"),
        (["--latency-mode", "graph"], 1, "latency mode graph needs a CUDA GPU, and this is a CPU"),
    ],
)
def test_targets_and_modes_that_make_no_sense_are_one_line(flags, code, said, tmp_path, capsys):
    assert cli.main([*QUICK, "--out", str(tmp_path / "o"), *flags]) == code
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
