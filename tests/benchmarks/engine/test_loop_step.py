"""A step of the loop is timed beside forward and backward of the models it has at that moment."""

import csv

import pytest
import timm
import torch

from benchmarks.engine import loop_step
from nvit.structure.masks import masks_of


def tiny():
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2, num_classes=10).eval()


def test_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["loop_step", "--tiny", "--rounds", "2", "--out", str(tmp_path)])
    assert loop_step.main() == 0
    with (tmp_path / "loop_step_cpu.csv").open() as file:
        dense, masked = csv.DictReader(file)
    assert dense["case"] == "dense" and masked["case"] == "masked"
    for row in (dense, masked):
        assert float(row["whole_cpu_ms"]) / float(row["alone_cpu_ms"]) > 0.5 and float(row["over_alone"]) > 0.5


def test_what_runs_alone_is_the_model_as_it_is_then(monkeypatch):
    """Once a step, masked from the decision on, and it leaves no gradient behind."""
    seen, real, model = [], loop_step.Interleaved.__init__, tiny()

    def watching(self, batch, alone, steps):
        def call():
            alone()
            assert all(p.grad is None for p in model.parameters())
            seen.append(masks_of(model) is not None)

        real(self, batch, call, steps)

    monkeypatch.setattr(loop_step.Interleaved, "__init__", watching)
    loader, config = loop_step.steps(model, 2, 1, 20)
    # It comes after the step, so that the one that decides, which is not timed, has the masked model beside it.
    assert seen == [step >= config.interval - 1 for step in range(2 * config.interval - 1)]
    assert len(loader.whole) == len(loader.alone) == len(seen)


def test_a_run_that_is_through_too_early_is_said():
    with pytest.raises(AssertionError, match="fewer bundles"):
        loop_step.steps(tiny(), 2, 1, 10**4)
