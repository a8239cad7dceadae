"""The benchmark refuses to time a wrong result, and its figures are what it measured."""

import runpy
from pathlib import Path

import pytest
import torch

from nvit_kernels import sparse24

BENCH = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "bench_sparse24.py"))


def test_a_wrong_result_is_not_timed(monkeypatch):
    x = torch.randn(64, 128)
    BENCH["check"]([x], torch.float16)
    right = sparse24.compress_2to4_many

    def flipped(*a, **k):
        return [p._replace(meta=p.meta.flip(0)) for p in right(*a, **k)]

    monkeypatch.setattr(sparse24, "compress_2to4_many", flipped)
    with pytest.raises(SystemExit, match="nothing timed"):
        BENCH["check"]([x], torch.float16)


def test_rows_carry_medians_and_ratios():
    times = {"peer": [4.0, 4.0, 4.0, 5.0, 3.0], "ours": [2.0, 2.0, 1.0, 2.0, 9.0]}
    peer, ours = BENCH["rows"]("case", times, "peer", 2_000_000, {"device": "d"})
    assert (peer["median_ms"], ours["median_ms"]) == (4.0, 2.0)
    assert ours["times_peer"] == 2.0 and ours["gbps"] == 1.0
    assert ours["p20_ms"] <= ours["median_ms"] <= ours["p80_ms"]
    assert set(peer) <= set(BENCH["FIELDS"])


def test_providers_take_turns():
    seen = []
    times = BENCH["measure"]({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, BENCH["time_cpu"], 0.0)
    assert seen == ["a", "b"] * 8
    assert all(len(t) == 5 for t in times.values())


def test_least_traffic():
    x = torch.empty(32, 64)
    assert BENCH["moved_bytes"]([x], torch.float16) == 32 * 64 * (4 + 2 / 2 + 1 / 8 + 1 / 8)
