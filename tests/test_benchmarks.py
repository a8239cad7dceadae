"""Every benchmark says what it measures; the one that decides nothing slow runs once."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import paired, records

NAMES = sorted(p.stem for p in Path(records.__file__).parent.glob("bench_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_help(name, monkeypatch, capsys):
    if name == "bench_pruning_step":
        pytest.importorskip("torch_pruning", reason="torch-pruning, an extra for this benchmark alone, is missing")
    bench = importlib.import_module(f"benchmarks.{name}")
    if not hasattr(bench, "main"):
        pytest.skip("takes no arguments")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert end.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_rows_are_printed_and_written(tmp_path, monkeypatch, capsys):
    from benchmarks import bench_decision

    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["bench_decision", "--model", "deit_tiny_patch16_224", "--rounds", "1"])
    threads = records.torch.get_num_threads()
    try:
        assert bench_decision.main() == 0
    finally:
        records.torch.set_num_threads(threads)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    written = (tmp_path / "decision_cpu.csv").read_text().splitlines()
    assert len(written) == len(printed) + 1 and printed[0]["units"] == 1 * 192 + 12 * (3 + 64 + 64 + 768)


def test_paired_bootstrap_agrees_with_the_normal_interval():
    draws = np.random.default_rng(0)
    shared = draws.normal(size=2000)  # hard for both: it has to cancel
    a, b = shared + draws.normal(0.1, 0.2, size=2000), shared + draws.normal(0.0, 0.2, size=2000)
    found = paired.paired_bootstrap(a, b)
    half = 1.96 * (a - b).std() / 2000**0.5
    assert found.mean == pytest.approx((a - b).mean()) and found.significant and found.better == 1
    # 10 000 resamples know a 2.5 % quantile to about 2 % of a half width.
    assert found.low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.1 * half)


def test_paired_bootstrap_of_the_same_answers_says_nothing():
    right = np.arange(50) % 3 == 0
    found = paired.paired_bootstrap(right, right)
    assert (found.mean, found.low, found.high, found.better) == (0, 0, 0, 0.5) and not found.significant
    with pytest.raises(ValueError, match="the same images in both"):
        paired.paired_bootstrap(right, right[1:])
