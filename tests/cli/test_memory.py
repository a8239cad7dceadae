"""Memory that runs out: one line that says which flag to lower, or half the batch."""

import json

import pytest
import torch

from nvit.cli import evaluate, latency, memory
from nvit.cli import main as cli
from nvit.training.step import Step

QUICK = ("--table", "analytic", "--latency-seconds", "0.2", "--latency-batch", "4", "--device", "cpu")
FAST = ["demo", *QUICK, "--interval", "1", "--bundles-per-step", "8", "--finetune-epochs", "0", "--eval-images", "16"]


@pytest.fixture
def small(monkeypatch):
    """A device that holds batches of 16."""
    step, seen = Step.__call__, []

    def stepping(self, images, labels):
        seen.append(len(images))
        if len(images) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return step(self, images, labels)

    monkeypatch.setattr(Step, "__call__", stepping)
    return seen


def test_auto_batch_halves_until_it_fits(small, tmp_path, capsys):
    assert cli.main([*FAST, "--auto-batch", "--out", str(tmp_path / "o")]) == 0
    assert small[:3] == [64, 32, 16] and set(small[3:]) == {16}
    said = capsys.readouterr().err
    assert "ran out with --batch-size 64; again with 32" in said and "with --batch-size 32; again with 16" in said
    assert json.loads((tmp_path / "o" / "result.json").read_text())["recipe"]["batch_size"] == 16


def test_without_it_one_line_says_so(small, tmp_path, capsys):
    assert cli.main([*FAST, "--out", str(tmp_path / "o")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "nvit: memory ran out; give --batch-size 32 in place of 64, or --auto-batch, which halves it until it fits"
    )
    assert not list(tmp_path.rglob("*traceback*"))


def test_the_batch_of_the_latency_is_another(monkeypatch, capsys):
    monkeypatch.setattr(latency, "open_table", lambda *_: torch.empty(2**60))
    assert cli.main(["latency", "digits", "--device", "cpu"]) == 1
    assert "memory ran out; give --batch-size" not in (line := capsys.readouterr().err) and line.count("\n") == 1

    def timing(model, *_):
        from nvit.latency.table import LatencyTable

        return LatencyTable.measure(model, 2**50, "cpu", seconds=0.1)

    monkeypatch.setattr(latency, "open_table", timing)
    assert cli.main(["latency", "digits", "--device", "cpu"]) == 1
    assert "memory ran out; give --latency-batch 32 in place of 64" in capsys.readouterr().err


def test_evaluation_halves_too_and_gives_up_at_one(monkeypatch, tmp_path, capsys):
    tried = []

    def never(name, command, progress):
        tried.append(command.batch_size)
        raise MemoryError

    monkeypatch.setattr(evaluate, "run_evaluate", never)
    assert cli.main(["evaluate", "digits", "--auto-batch", "--batch-size", "4", "--device", "cpu"]) == 1
    assert tried == [4, 2, 1] and "give --batch-size 1 in place of 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory of how this works"), False),
    ],
)
def test_what_counts(error, is_memory):
    assert memory.ran_out(error) == is_memory
