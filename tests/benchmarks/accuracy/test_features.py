"""Towers pruned by features and by classes, as the benchmark compares them, in small."""

import csv

import pytest
import torch

import nvit
from benchmarks.accuracy.features import CASES, compare, difference
from benchmarks.accuracy.rows import Resumed
from tests.hosts import images, make


def test_the_difference_is_paired_over_images():
    right, dense = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 1]).bool()
    points, off = difference(right, dense)
    assert points == -25  # of 0, 100, -100, -100
    assert off == pytest.approx(100 * torch.tensor([0.0, 1, -1, -1]).std().item() / 2)
    assert difference(dense, dense) == (0, 0)


def test_every_way_to_prune_a_tower_has_its_row(tmp_path):
    pytest.importorskip("sklearn", reason="pip install 'nvit[probe]'")
    dense = make("plain")
    x, y = images(dense, 16), torch.arange(16) % 4
    bank, asked = (list(zip(x[side], y[side].tolist(), strict=True)) for side in (slice(0, 8), slice(8, 16)))
    base = nvit.PruneConfig(
        latency_target=0.5, train=False, refit=True, images=8, batch_size=4, bundle_heads=1, bundle_emb=8, bundle_mlp=4
    )
    given = "features", ("case", "stream", "epochs")
    compare(dense, bank, asked, base, Resumed(*given, folder=tmp_path), CASES[:1], (3,))
    compare(dense, bank, asked, base, records := Resumed(*given, folder=tmp_path), CASES[1:])
    rows = list(csv.DictReader(records.path.open()))
    whole = [("features", "whole", 0), ("features", "whole", 3), ("dense", "whole", 0), ("classification", "whole", 0)]
    others = [("features", "restored", 0), ("classification", "narrow", 0)]
    assert [(r["case"], r["stream"], int(r["epochs"])) for r in rows] == whole + others
    assert all(int(r["macs"]) < 0.6 * int(rows[2]["macs"]) for r in rows if r["case"] != "dense")
    assert float(rows[2]["cosine"]) == pytest.approx(1, abs=1e-6) and float(rows[2]["knn_points_se"]) == 0
    assert [int(r["width"]) for r in rows[:5]] == [48] * 5 and int(rows[5]["width"]) < 48 and rows[5]["cosine"] == ""
    assert rows[1]["cosine"] > rows[0]["cosine"], "what training is for"
