"""What a command sets for the time it runs, and what its flags are made of."""

import dataclasses

import pytest
import torch

import nvit
from nvit.cli import main as cli
from nvit.cli.command import flat, parts
from nvit.cli.commands import COMMANDS
from nvit.layers import functional
from nvit.utils.memory import Meter
from tests.runs import arguments

QUICK = ("--table", "analytic", "--latency-seconds", "0.2", "--latency-batch", "4", "--device", "cpu")


@pytest.fixture
def asked(monkeypatch):
    """Whether kernels were on, each time a layer asked."""
    seen, ask = [], functional._kernels

    def asking(*args):
        seen.append(functional._kernels_on)
        return ask(*args)

    monkeypatch.setattr(functional, "_kernels", asking)
    return seen


def test_no_kernels_holds_for_the_whole_command_and_no_longer(asked, tmp_path):
    tune = ["finetune", "digits", "--teacher", "digits", "--epochs", "0.05", "--device", "cpu"]
    assert cli.main([*tune, "--no-kernels", "--out", str(tmp_path / "f")]) == 0
    assert asked and not any(asked), "opening the teacher turned kernels on again"
    assert functional._kernels_on
    asked.clear()
    assert cli.main(["evaluate", "digits", "--device", "cpu"]) == 0
    assert asked and all(asked)


def test_a_failed_command_gives_the_switch_back(tmp_path, capsys):
    assert cli.main(["evaluate", "no_such_model", "--no-kernels"]) == 1
    assert functional._kernels_on
    with functional.kernels(False):
        with functional.kernels(True):
            assert functional._kernels_on
        assert not functional._kernels_on


def test_one_meter_a_run(monkeypatch, tmp_path):
    """A second one would start the peak anew from what is held then."""
    restarts, restart = [], Meter.restart
    monkeypatch.setattr(Meter, "restart", lambda self: (restarts.append(self), restart(self))[1])
    args = ["demo", "--no-train", "--finetune-epochs", "0", "--budget", "40GB", *QUICK, "--out", str(tmp_path / "o")]
    assert cli.main(args) == 0
    assert len(restarts) == 1


def test_a_run_under_a_budget_goes_on_with_the_callers_peak():
    model, data, settings, table = arguments(
        train=False, criterion="fisher", latency_target=(0.8,), budget=f"{Meter('cpu').held / 1e6 + 400:.0f}MB"
    )
    meter = Meter("cpu")
    before = torch.ones(2**26)  # 256 MB, gone before pruning
    peak = meter.peak
    del before
    memory = nvit.prune(model, data, settings, table, meter=meter).memory
    assert meter.held < peak - 2e8
    assert memory["peak"] >= peak - 2e6  # Linux adds up resident pages in batches


@pytest.mark.parametrize("name", COMMANDS)
def test_no_flag_of_a_part_hides_another(name):
    command = COMMANDS[name].flags()
    own = len(dataclasses.fields(command)) - len(parts(command))
    assert len(flat(command)) == own + sum(len(dataclasses.fields(part)) for part in parts(command).values())
    assert not flat(command).keys() & parts(command).keys()
