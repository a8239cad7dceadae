"""The gate: what is wrong is not timed, what is unsupported says why, and our own wrong result stops the run."""

import csv

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Case, SkipProvider, measure


def right():
    return torch.ones(4)


def wrong():
    return torch.ones(4) + 0.5


def unsupported():
    raise SkipProvider("no such backend")


def broken():
    raise RuntimeError("out of order\nmore")


def test_only_right_results_are_timed():
    rows = {r.provider: r for r in measure(Case("c", dict(a=wrong, b=right, c=unsupported, d=broken), right))}
    assert [rows[p].median_ms is None for p in "abcd"] == [True, False, True, True]
    assert "not timed: wrong by 5.0e-01" in rows["a"].note and rows["c"].note == "skipped: no such backend"
    assert rows["d"].note == "skipped: out of order" and rows["b"].p20_ms <= rows["b"].median_ms <= rows["b"].p80_ms


@pytest.mark.parametrize("call", [wrong, lambda: torch.full((4,), float("nan"))])
def test_our_own_wrong_result_stops_the_run(call):
    with pytest.raises(AssertionError, match="will not be timed"):
        measure(Case("c", {"nvit fused": call}, right))


def test_rows_and_figure_are_saved(tmp_path):
    rows = [row for case in harness.ceilings() for row in measure(case)] + measure(Case("c", dict(nvit=right), right))
    path = harness.save(rows, "op", tmp_path)
    with path.open() as file:
        saved = list(csv.DictReader(file))
    assert [r["case"] for r in saved] == [r.case for r in rows] and float(saved[0]["median_ms"]) > 0
    assert "GB/s" in saved[0]["note"] and "TFLOP/s" in saved[1]["note"] and saved[-1]["commit"]
    assert path.with_suffix(".png").stat().st_size > 1000
