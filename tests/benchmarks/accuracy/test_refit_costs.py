"""Rows that are measured on different days and compared image by image."""

import torch

from benchmarks import harness
from benchmarks.accuracy import refit_costs


def test_answers_by_image_come_back_from_their_digits():
    for count in (1, 4, 650, 1299):
        right = torch.rand(count, generator=torch.Generator().manual_seed(count)).round()
        digits = refit_costs.bits(right)
        assert len(digits) == -(-count // 4) and refit_costs.answered(digits, count) == right.tolist()


def test_a_point_is_compared_with_the_predicted_one_that_the_file_has(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    before, now = torch.zeros(40), torch.zeros(40)
    now[1::2] = 1
    point = {"model": refit_costs.MODEL, "target": 0.65, "calibration": 300}
    for row in ({"cost": "measured"}, {"cost": "predicted"}):
        records = refit_costs.ordered("refit_costs", refit_costs.KEY)
        assert refit_costs.gain(point | row, now, records) == {}, "nothing to compare with"
        records.add(**point, **row, right=refit_costs.bits(before))
    records = refit_costs.ordered("refit_costs", refit_costs.KEY)
    assert len(records.rows) == 2, "rows of other points stay"
    found = refit_costs.gain(point | {"cost": "measured"}, now, records)
    assert (found["gain"], found["gain_odd"]) == (50, 100) and found["low"] < 50 < found["high"]
    assert refit_costs.gain(point | {"cost": "measured", "target": 0.8}, now, records) == {}


def test_curves_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert refit_costs.known_curves("m", 300) == {}
    records = refit_costs.ordered("cost_curves", refit_costs.CURVE_KEY)
    for gone, cost in ((8, 0.25), (16, 0.5)):
        records.add(model=refit_costs.MODEL, group="g", gone=gone, calibration=300, measured=cost)
    assert refit_costs.known_curves(refit_costs.MODEL, 300) == {"g": refit_costs.Curve((8, 16), (0.25, 0.5))}
    assert refit_costs.known_curves(refit_costs.MODEL, 100) == {}
