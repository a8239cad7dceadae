"""Models side by side: in the dtype and mode asked for, with images per second beside milliseconds."""

import json

import numpy as np
import pytest
import torch

from nvit import LatencyTable
from nvit.analysis import compare
from nvit.cli import main as cli
from nvit.cli.flags import LatencyFlags
from nvit.structure.compact import compact
from tests.hosts import images, make, masked, prepared

SMALL_BUNDLES = {"emb": 16, "heads": 1, "qk_dim": 8, "v_dim": 8, "mlp": 16}


def test_rows_have_images_per_second_of_the_batch_that_was_timed(monkeypatch):
    model, groups, masks = masked("plain")
    small, (dense, _) = compact(model, groups, masks), prepared("plain")
    monkeypatch.setattr(compare, "time_rounds", lambda *_: np.full((9, 2), [8.0, 4.0]))
    table = LatencyTable.analytic(dense, SMALL_BUNDLES)
    rows = compare.side_by_side([dense, small], table, images(dense, 16), 0.1)
    assert [r["images_per_s"] for r in rows] == [2000.0, 4000.0]
    assert [r["speedup"] for r in rows] == [1.0, 2.0]


def test_models_are_timed_in_the_dtype_of_the_images_and_in_the_mode_asked_for(monkeypatch):
    seen = []

    def timed(models, x, seconds, mode):
        seen.append((x.dtype, {p.dtype for m in models for p in m.parameters()}, mode))
        return np.ones((9, len(models)))

    monkeypatch.setattr(compare, "time_rounds", timed)
    model = make("plain")
    compare.measured([model], images(model, 2).bfloat16(), 0.1, "compile")
    assert seen == [(torch.bfloat16, {torch.bfloat16}, "compile")]
    assert next(model.parameters()).dtype == torch.float32, "the user's model is left as it is"


def test_flags_say_how_latency_is_measured_here():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert LatencyFlags().deployed(cpu) == ("eager", torch.float32)
    assert LatencyFlags().deployed(gpu) == ("graph", torch.bfloat16)
    asked = LatencyFlags(latency_mode="eager", latency_dtype="float16")
    assert asked.deployed(gpu) == asked.deployed(cpu) == ("eager", torch.float16)
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        LatencyFlags(latency_mode="graph").deployed(cpu)


def test_the_command_prints_both_and_says_how_they_were_measured(tmp_path, capsys):
    args = ["compare", "digits", "digits", "--table", "analytic", "--latency-batch", "4", "--seconds", "0.1"]
    args += ["--eval-images", "16", "--device", "cpu", "--latency-dtype", "bfloat16", "--out", str(tmp_path)]
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    assert "4 images a batch on cpu, bfloat16, eager" in printed and "images/s" in printed
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["latency_mode"], found["latency_dtype"]) == ("eager", "bfloat16")
    for row in found["models"]:
        assert row["images_per_s"] == pytest.approx(4e3 / row["latency_ms"])
