"""A stage that fails, hangs or cannot start stops none after it, and the table at the end says so."""

import os
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu, gpu_report, harness, told_at_once
from benchmarks.gpu import Stage

WRITES = "import sys, pathlib; (pathlib.Path(sys.argv[1]) / 'done').write_text('yes'); print('all well')"


def script(code, *words):
    return [sys.executable, "-c", code, *words]


def run(tmp_path, *stages, seconds=60.0, on_gpu=True):
    return {o.name: o for o in gpu.run(stages, tmp_path, tmp_path, seconds, on_gpu)}


def test_nothing_stops_the_next_stage(tmp_path):
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    found = run(
        tmp_path,
        Stage("fails", 20, [script("print('before'); raise ValueError('no good')")]),
        Stage("hangs", 1.5, [script(f"{child} print(p.pid, flush=True); time.sleep(600)")]),
        Stage("absent", 20, [["/no/such/program"]]),
        Stage("cannot", 20, [script(f"print('no tool'); raise SystemExit({gpu.SKIPPED})")]),
        Stage("works", 20, [script(WRITES, "OUT")]),
    )
    assert {n: o.state for n, o in found.items()} == {
        "fails": "failed",
        "hangs": "timed out",
        "absent": "failed",
        "cannot": "skipped",
        "works": "passed",
    }
    assert "no good" in found["fails"].note and found["cannot"].note == "no tool"
    assert 1.5 <= found["hangs"].seconds < 10 and found["works"].note == "all well"
    assert (tmp_path / "done").read_text() == "yes" and "before" in (tmp_path / "fails.log").read_text()
    grandchild = int((tmp_path / "hangs.log").read_text().splitlines()[-1])
    deadline = time.monotonic() + 5
    while alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(grandchild), "what the stage had started is still running"


def alive(pid):
    """Whether a process runs; one that has ended and waits for its parent does not."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


MEETS = """
import pathlib, sys, time
folder, mine, other, code = pathlib.Path(sys.argv[1]), *sys.argv[2:5]
(folder / mine).touch()
end = time.monotonic() + 60
while not (folder / other).exists():
    assert time.monotonic() < end, f"{other} never ran beside {mine}"
    time.sleep(0.02)
(folder / f"{mine}.ended").touch()
raise SystemExit(int(code))
"""
"""Ends with the code once the other is there, so that two of them end only where they run at the same time."""


def test_processes_of_a_stage_run_together_and_one_that_fails_is_told(tmp_path):
    pair = [script(MEETS, "OUT", "a", "b", "0"), script(MEETS, "OUT", "b", "a", "3")]
    found = run(tmp_path, Stage("pair", 90, pair), seconds=200)
    assert found["pair"].state == "failed" and "exit 3" in found["pair"].note
    assert (tmp_path / "pair_0.log").exists() and (tmp_path / "pair_1.log").exists()


def test_a_stage_beside_another_starts_with_it_and_the_next_after_both(tmp_path):
    one, two = [script(MEETS, "OUT", "a", "b", "0")], [script(MEETS, "OUT", "b", "a", "0")]
    code = "import pathlib, sys; sys.exit(len(list(pathlib.Path(sys.argv[1]).glob('*.ended'))) != 2)"
    after = [script(code, "OUT")]
    found = run(
        tmp_path, Stage("one", 90, one), Stage("two", 90, two, beside=True), Stage("three", 90, after), seconds=300
    )
    assert {o.state for o in found.values()} == {"passed"}


def test_stages_end_with_the_time_for_all(tmp_path):
    hangs = Stage("hangs", 60, [script("import time; time.sleep(60)")])
    found = run(tmp_path, hangs, Stage("late", 60, [script(WRITES, "OUT")]), seconds=5.5)
    assert found["hangs"].state == "timed out" and found["hangs"].seconds < 12
    assert found["late"].state == "skipped" and "are over" in found["late"].note


def test_what_is_missing_is_named(tmp_path):
    stages = Stage("a", 9, [], ("no_such_module", "os")), Stage("b", 9, [], ()), Stage("c", 9, [], (), gpu=False)
    assert gpu.obstacle(stages[0], True) == "no_such_module not installed"
    assert gpu.obstacle(stages[1], False) == "no CUDA device" and gpu.obstacle(stages[1], True) is None
    assert gpu.obstacle(stages[2], False) is None


def test_what_is_measured_beside_others_does_not_decide_for_those_alone(tmp_path):
    caches = {}
    for stage in gpu.stages():
        around = gpu.surroundings(tmp_path, stage)
        caches[stage.name] = around["NVIT_CACHE"]
        assert around["PYTHONPATH"].split(os.pathsep)[0] == str(gpu.ROOT)
    assert caches["check"] == caches["tests"] != caches["mlp"] == caches["latency"]


def test_stages_fit_the_time_and_their_flags_exist(monkeypatch, capsys):
    names = [s.name for s in gpu.stages()]
    assert len(set(names)) == len(names)
    assert {"build", "tests", "sanitizer", "step", "loop", "latency", "sparse24", "attention", "merge_tokens"} <= set(
        names
    )
    assert gpu.SECONDS <= 8 * 60
    for stage in gpu.stages():
        assert stage.limit <= 110
        for words in stage.commands:
            if words[1] != "-m" or not words[2].startswith("benchmarks"):
                continue
            name = words[2] if words[2] != "benchmarks.kernels" else "benchmarks.kernels.__main__"
            monkeypatch.setattr("sys.argv", [name, "--help"])
            with pytest.raises(SystemExit):
                import_module(name).main()
            said = capsys.readouterr().out
            assert all(word in said for word in words[3:] if word.startswith("--")), words


def test_every_file_with_a_gpu_test_is_run(monkeypatch):
    files = gpu.gpu_tests()
    assert {"tests/nvit_kernels/test_gpu.py", "tests/nvit_kernels/test_merge_tokens_gpu.py"} <= set(files)
    assert all((gpu.ROOT / f).exists() for f in files)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    alone = gpu.pytest_commands(4)
    assert [c[-1] for c in alone] == files and "-n" not in alone[0]
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    assert len(gpu.pytest_commands(4)) == 1 and "-n" in gpu.pytest_commands(4)[0]


def test_the_command_keeps_what_was_found(tmp_path, monkeypatch, capsys):
    stages = [Stage("works", 20, [script(WRITES, "OUT")], gpu=False), Stage("fails", 20, [script("1 / 0")], gpu=False)]
    monkeypatch.setattr(gpu, "stages", lambda: stages)
    monkeypatch.setattr(gpu, "gpu_there", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path / "out")])
    assert gpu.main() == 1
    table = (tmp_path / "out" / "logs" / "report.md").read_text()
    assert "| works | passed |" in table and "ZeroDivisionError" in table and table in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path / "out"), "--only", "works"])
    assert gpu.main() == 0


def test_the_table_sets_ours_beside_the_best_peer(tmp_path):
    old = tmp_path / "gpu_mlp.csv"
    harness.write(old, [harness.Row(case="old", provider="nvit", median_ms=1.0)])
    os.utime(old, (1, 1))
    rows = [
        harness.Row(case="c", provider="nvit fused", median_ms=0.2, host_ms=0.01),
        harness.Row(case="c", provider="nvit gather", median_ms=0.1, host_ms=0.0213),
        harness.Row(case="c", provider="peer", median_ms=0.15, host_ms=0.005),
        harness.Row(case="c", provider="other", note="skipped: no such backend"),
        harness.Row(case="d", provider="nvit", note="not timed: wrong"),
    ]
    harness.write(tmp_path / "gpu_attention.csv", rows)
    merges = [
        harness.Row(case="block of B b8", provider="timm", median_ms=1.0),
        harness.Row(case="merge_tokens forward B b8", provider="nvit", median_ms=0.0432),
        harness.Row(case="merge_tokens forward B b8", provider="torch", median_ms=0.2),
        harness.Row(case="merge_tokens forward+backward B b8", provider="nvit", median_ms=0.1),
    ]
    harness.write(tmp_path / "gpu_merge_tokens.csv", merges)
    (tmp_path / "gpu_pruned_deit.csv").write_text("case,measured_ms,speed_up,note\nB,12.345,1.9,\n")
    text = gpu_report.report([gpu.Outcome("mlp", "timed out", 3.2, "limit 3 s")], tmp_path, since=2.0)
    assert "| mlp | timed out | 3 | limit 3 s |" in text and "old" not in text
    assert "| c | nvit gather | 100 | 21.3 | peer | 150 | 5 | 1.50 |" in text
    assert "| d | – | – | – | – | – | – | – |" in text
    assert text.count("| 4.3 |") == 1 and "| merge_tokens forward B b8 | 43.2 | 1000 | 4.3 |" in text
    assert "| B | – | 12.3 | – | 1.9 |" in text


def test_a_failure_is_told_when_it_happens(capsys):
    report = SimpleNamespace(
        failed=True, nodeid="test_x.py::test_y", when="call", longreprtext="line\n" * 50 + "E boom"
    )
    told_at_once.pytest_runtest_logreport(report)
    told_at_once.pytest_runtest_logreport(SimpleNamespace(failed=False))
    said = capsys.readouterr().err
    assert "FAILED test_x.py::test_y" in said and said.endswith("E boom\n") and said.count("line") == 14
