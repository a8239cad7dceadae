"""The one benchmark of the engine that decides nothing slow runs once."""

import json

from benchmarks import harness
from benchmarks.engine import decision


def test_rows_are_printed_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["decision", "--model", "deit_tiny_patch16_224", "--rounds", "1"])
    threads = harness.torch.get_num_threads()
    try:
        assert decision.main() == 0
    finally:
        harness.torch.set_num_threads(threads)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    written = (tmp_path / "decision_cpu.csv").read_text().splitlines()
    assert len(written) == len(printed) + 1 and printed[0]["units"] == 1 * 192 + 12 * (3 + 64 + 64 + 768)
