"""`nvit sparsify`: what it leaves, what it says."""

import csv
import json

import nvit
from nvit import sparse24
from nvit.cli import main as cli
from nvit.cli import sparsify
from nvit.training.images import DigitImages
from tests.sparse24.test_sparse24 import is_2to4

COMMON = ["sparsify", "digits", "--permute-seconds", "1", "--device", "cpu"]


def test_by_curvature_hardly_anything_is_lost(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main([*COMMON, "--choice", "curvature", "--images", "200", "--out", str(out)]) == 0
    found = json.loads((out / "result.json").read_text())
    assert found["choice"] == "curvature" and found["sparse_layers"] == 16
    assert found["top1"] == found["top1_sparse"] >= found["top1_dense"] - 1.5
    model = nvit.load(out)
    assert all(is_2to4(p.weight) for p in sparse24.projections(model).values())
    said = capsys.readouterr().out
    assert "2:4 by curvature" in said and "top-1 fell" not in said


def test_a_summary_for_people_and_a_row_per_projection_in_a_file(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main([*COMMON, "--no-permute", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("masked (no sparse tensor cores on cpu)") == 4, "a line for each kind of projection"
    assert str(out / "projections.csv") in said
    with (out / "projections.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and {r["backend"] for r in rows} == {"masked"}
    assert all(0.7 < float(r["kept"]) < 0.8 for r in rows)


def test_what_is_faster_and_what_is_not_are_told_apart():
    row = {"backend": "cuSPARSELt", "why": "measured faster", "dense_ms": 2.0, "sparse_ms": 1.5, "kept": 0.8}
    slow = {"backend": "dense", "why": "cuSPARSELt is slower here", "dense_ms": 1.0, "sparse_ms": 1.25, "kept": 1.0}
    layers = [
        row | {"weight": "blocks.0.mlp.fc1.weight"},
        row | {"weight": "blocks.1.mlp.fc1.weight", "kept": 0.7},
        slow | {"weight": "blocks.0.mlp.fc2.weight"},
    ]
    assert sparsify.summary(layers) == [
        "2 × fc1: cuSPARSELt (measured faster), 0.750 of its magnitude; together dense 4.000 ms, sparse 3.000 ms",
        "1 × fc2: dense (cuSPARSELt is slower here), 1.000 of its magnitude; together dense 1.000 ms, sparse 1.250 ms",
    ]


def test_a_large_loss_is_said_with_the_way_out():
    found = {"model": "deit", "metric": "top1", "choice": "magnitude", "top1_dense": 80.0, "top1": 74.9}
    line = sparsify.way_out(found)
    assert "fell by 5.1 points" in line and "nvit sparsify deit" in line
    assert "--choice curvature" in line and "--epochs 5" in line
    assert "--choice" not in sparsify.way_out(found | {"choice": "curvature"})
    assert sparsify.way_out(found | {"top1": 75.0}) is None
    assert sparsify.way_out(found | {"top1_dense": None, "top1": None}) is None
    assert sparsify.way_out({"metric": "mae", "mae_dense": 80.0, "mae": 1.0}) is None


def test_a_log_without_training_is_refused(tmp_path, capsys):
    assert cli.main([*COMMON, "--log", "csv", "--out", str(tmp_path / "a")]) == 2
    assert "--log csv is of finetuning, and --epochs is 0" in capsys.readouterr().err


def test_curvature_without_images_is_refused(tmp_path, capsys):
    timm = ["sparsify", "test_vit", "--no-pretrained", "--device", "cpu", "--choice", "curvature"]
    assert cli.main([*timm, "--out", str(tmp_path / "a")]) == 1
    assert "--data is missing" in capsys.readouterr().err
    assert cli.main([*COMMON, "--choice", "curvature", "--images", "0", "--out", str(tmp_path / "b")]) == 1
    assert "--images 0: --choice curvature needs calibration images" in capsys.readouterr().err


def test_calibration_takes_as_many_images_as_asked():
    batches = list(sparsify.calibration(DigitImages(), 70, seed=0))
    assert [len(b) for b in batches] == [32, 32, 6]
    again = list(sparsify.calibration(DigitImages(), 70, seed=0))
    assert all(bool((a == b).all()) for a, b in zip(batches, again, strict=True))
