"""Every benchmark says what it measures; the one that decides nothing slow runs once."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import records

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
