"""The benchmark refuses to time a wrong result, and its figures are what it measured."""

import csv

import pytest
import torch

from benchmarks.kernels import sparse24 as bench
from benchmarks.timing import Timing, in_turns, spread
from nvit_kernels import sparse24


def test_a_wrong_result_is_not_timed(monkeypatch):
    x = torch.randn(64, 128)
    bench.check([x], torch.float16)
    right = sparse24.compress_2to4_many

    def flipped(*a, **k):
        return [p._replace(meta=p.meta.flip(0)) for p in right(*a, **k)]

    monkeypatch.setattr(sparse24, "compress_2to4_many", flipped)
    with pytest.raises(SystemExit, match="nothing timed"):
        bench.check([x], torch.float16)


def test_rows_carry_medians_and_ratios():
    times = {"peer": [4.0, 4.0, 4.0, 5.0, 3.0], "ours": [2.0, 2.0, 1.0, 2.0, 9.0]}
    timings = {name: Timing(spread(mine)) for name, mine in times.items()}
    peer, ours = bench.rows("case", timings, "peer", 2_000_000, {"device": "d"})
    assert (peer["median_ms"], ours["median_ms"]) == (4.0, 2.0)
    assert ours["times_peer"] == 2.0 and ours["gbps"] == 1.0
    assert ours["p20_ms"] <= ours["median_ms"] <= ours["p80_ms"]
    assert set(peer) <= set(bench.FIELDS)


def test_providers_take_turns():
    seen = []
    times = in_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, least=5, dropped=3)
    assert seen == ["a", "b"] * 8
    assert all(len(t) == 5 for t in times.values())


def test_least_traffic():
    x = torch.empty(32, 64)
    assert bench.moved_bytes([x], torch.float16) == 32 * 64 * (4 + 2 / 2 + 1 / 8 + 1 / 8)


def test_rows_are_added_to_the_columns_that_are_there(tmp_path):
    times = {"peer": Timing((4.0, 4.0, 4.0)), "ours": Timing((2.0, 2.0, 2.0), (0.5, 0.5, 0.5), "note")}
    rows = bench.rows("case", times, "peer", 1, {"device": "d"})
    bench.append(tmp_path / "new.csv", rows)
    (tmp_path / "old.csv").write_text("case,provider,median_ms\nx,y,1\n")
    bench.append(tmp_path / "old.csv", rows)
    with (tmp_path / "new.csv").open() as new, (tmp_path / "old.csv").open() as old:
        assert [r["host_ms"] for r in csv.DictReader(new)] == ["", "0.5"]
        assert [list(r.values()) for r in csv.DictReader(old)][1:] == [["case", "peer", "4.0"], ["case", "ours", "2.0"]]
