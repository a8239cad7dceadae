"""Runtimes side by side: what one computes is looked at before it is timed."""

import csv

import pytest
import torch

from benchmarks.engine import runtimes
from benchmarks.harness import Records
from tests.hosts import make


@pytest.fixture
def models():
    return {"dense": make("plain"), "pruned": make("plain", depth=1)}


@pytest.mark.usefixtures("torchlib_once")
def test_only_what_is_right_is_timed(models, tmp_path, monkeypatch):
    monkeypatch.setattr(runtimes, "RUNTIMES", {"onnxruntime": "onnx"})
    images, records = torch.randn(2, 3, 16, 16), Records("runtimes", folder=tmp_path)
    assert runtimes.compare(models, images, 0.5, 0.0, records) == 0
    with records.path.open() as file:
        dense, pruned, dense_there, pruned_there = csv.DictReader(file)
    assert dense["ratio"] == "" and 0 < float(pruned["ratio"]) < 1 and pruned["predicted_ratio"] == ""
    assert dense_there["runtime"].startswith("onnxruntime ") and float(dense_there["ms"]) > 0
    assert float(pruned_there["ratio_error"]) == pytest.approx(0.5 / float(pruned_there["ratio"]) - 1, rel=1e-3)


def test_a_runtime_that_computes_something_else_ends_the_run(models, tmp_path, monkeypatch, capsys):
    images, records = torch.randn(2, 3, 16, 16), Records("runtimes", folder=tmp_path)
    right = runtimes.calls(models, images, runtimes.TORCH)
    swapped = [lambda: right["dense"](), lambda: right["dense"]()]
    monkeypatch.setattr(runtimes, "ready", lambda *a: swapped)
    assert runtimes.compare(models, images, 0.5, 0.0, records) == 1
    assert "onnxruntime: pruned: logits are" in capsys.readouterr().err
    assert [row["runtime"][:5] for row in records.rows] == ["torch", "torch"], "a wrong one is not timed"
