"""How a command ends when something fails or a person stops it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nvit.cli import finetune, latency, prune
from nvit.cli import main as cli
from nvit.cli.flags.prune import PruneCommand
from nvit.structure.run_state import load_run_state
from tests.training.test_folders import picture

QUICK = ("--table", "analytic", "--latency-seconds", "0.2", "--latency-batch", "4", "--device", "cpu")
SHORT = ("--latency-target", "0.8", "--finetune-epochs", "0", "--interval", "2", "--bundles-per-step", "4")


def fail(*_, **__):
    return {}["nobody foresaw this"]


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C, also where the suite runs in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setattr(prune, "open_table", fail)
    monkeypatch.setattr(latency, "open_table", fail)


def said(capsys) -> str:
    """What stands on stderr: one line of the command's own, nothing else."""
    err = capsys.readouterr().err
    assert err.startswith("nvit: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("said", ["--help", "prune --help", "nothing"])
def test_a_reader_who_has_left_is_no_error(said):
    """`nvit … | head -1`: the exit code is a shell's for SIGPIPE, and nothing is said."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "nvit", *said.split()]
    if said == "nothing":  # to either reader: bad usage is told on stderr
        assert subprocess.run(command, stdout=write, stderr=write).returncode == cli.UNREAD
    else:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (cli.UNREAD, "")
    os.close(write)


def test_a_table_s_reader_may_leave_as_well(tmp_path, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.main(["analyze", "widths", "digits", "--out", str(tmp_path)]) == cli.UNREAD
    assert capsys.readouterr().err == "" and (tmp_path / "result.json").exists()


def test_an_error_nobody_foresaw_is_a_line_and_a_file(broken, tmp_path, capsys):
    out = tmp_path / "o"
    assert cli.main(["demo", "--out", str(out), *QUICK]) == 1
    file = out / "nvit-traceback.txt"
    assert "KeyError: 'nobody foresaw this'" in (line := said(capsys)) and str(file) in line
    kept = file.read_text()
    assert kept.startswith("nvit ") and f"nvit demo --out {out}" in kept
    assert "Traceback (most recent call last)" in kept and ", in fail" in kept


def test_without_a_folder_the_file_lies_here_and_else_where_temporary_files_do(broken, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["latency", "digits", "--device", "cpu"]) == 1
    assert "nvit-traceback.txt" in said(capsys) and ", in fail" in (tmp_path / "nvit-traceback.txt").read_text()
    (tmp_path / "nvit-traceback.txt").unlink()
    (tmp_path / "nvit-traceback.txt").mkdir()
    (tmp_path / "t").mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "t"))
    assert cli.main(["latency", "digits", "--device", "cpu"]) == 1
    assert str(tmp_path / "t" / "nvit-traceback.txt") in said(capsys)


def test_debug_prints_the_traceback_of_any_error(broken, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--debug", *QUICK]) == 1
    err = capsys.readouterr().err
    assert ", in fail" in err and err.splitlines()[-1].startswith("nvit: KeyError")
    assert not list(tmp_path.rglob("*traceback*"))
    assert cli.main(["evaluate", "no_such_model", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("nvit: model 'no_such_model'")


def test_a_refusal_of_another_library_is_not_one_of_ours(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prune, "open_table", lambda *_: int("three"))
    assert cli.main(["demo", "--out", str(tmp_path / "o"), *QUICK]) == 1
    assert "ValueError: invalid literal" in said(capsys) and (tmp_path / "o" / "nvit-traceback.txt").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_is_ours_to_name_also_out_of_a_loading_process(workers, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(10):
        picture(tmp_path / "data" / str(i) / "x.png", size=8, mode="L")
    (tmp_path / "data" / "3" / "y.png").write_text("x")
    args = ["evaluate", "digits", "--data", "data", "--class-order", "lexical", "--device", "cpu"]
    assert cli.main([*args, "--workers", workers]) == 1
    line = said(capsys)
    assert "y.png cannot be read as an image" in line and "nobody foresaw" not in line
    assert not (tmp_path / "nvit-traceback.txt").exists()


def test_a_refusal_leaves_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "no_such_model"]) == 1
    assert "neither a snapshot folder" in said(capsys) and not list(tmp_path.iterdir())


def test_a_folder_with_a_traceback_can_be_run_in_again(broken, tmp_path, monkeypatch):
    args = ["demo", "--no-train", "--out", str(tmp_path / "o"), *QUICK, *SHORT]
    assert cli.main(args) == 1
    monkeypatch.undo()
    assert cli.main(args) == 0


class Impatient:
    """A progress that sends Ctrl-C once work of this kind is under way."""

    def __init__(self, work: str, calls: int = 2) -> None:
        self.work, self.left = work, calls

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def __call__(self, done: int, total: int, text: str) -> None:
        if text.startswith(self.work):
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_before_there_is_a_state_offers_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prune, "shown", lambda *_: Impatient("measuring", 1))
    args = [
        "demo",
        "--out",
        str(tmp_path / "o"),
        "--latency-seconds",
        "0.2",
        "--device",
        "cpu",
        "--latency-batch",
        "4",
    ]
    assert cli.main([*args, "--threads", "0"]) == 130
    assert said(capsys) == "nvit: interrupted\n" and not list(tmp_path.rglob("*.safetensors"))


def test_ctrl_c_while_pruning_saves_the_step_and_resume_ends_as_if_it_had_not_come(tmp_path, capsys, monkeypatch):
    def args(name: str) -> list[str]:
        return ["demo", *QUICK, *SHORT, "--out", str(tmp_path / name)]

    assert cli.main(args("whole")) == 0
    with monkeypatch.context() as m:
        m.setattr(prune, "shown", lambda *_: Impatient("prune", 5))
        assert cli.main(args("o")) == 130
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "nvit: interrupted; the same command with --resume goes on"
    _, values = load_run_state(tmp_path / "o" / "run_state.safetensors")
    assert values["trainer"]["step"] == values["pruner"]["steps"] == 5, "the step was finished first"
    assert cli.main([*args("o"), "--resume"]) == 0
    assert (tmp_path / "o" / "history.csv").read_text() == (tmp_path / "whole" / "history.csv").read_text()
    weights = [(tmp_path / n / "target-0.8" / "weights.safetensors").read_bytes() for n in ("o", "whole")]
    assert weights[0] == weights[1]


def test_ctrl_c_while_finetuning(tmp_path, capsys, monkeypatch):
    args = ["finetune", "digits", "--epochs", "0.5", "--distill-weight", "0", "--device", "cpu"]
    args += ["--out", str(tmp_path / "f")]
    with monkeypatch.context() as m:
        m.setattr(finetune, "shown", lambda *_: Impatient("finetune", 3))
        assert cli.main(args) == 130
    assert "--resume goes on" in capsys.readouterr().err
    state = tmp_path / "f_state.safetensors"
    assert load_run_state(state)[1]["trainer"]["step"] == 3
    assert cli.main([*args, "--resume"]) == 0
    assert json.loads((tmp_path / "f" / "result.json").read_text())["epochs"] == 0.5 and not state.exists()


def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch, capsys):
    from nvit.training import step

    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(step.Step, "__call__", twice)
    assert cli.main(["demo", *QUICK, *SHORT, "--out", str(tmp_path / "o")]) == 130
    assert "--resume" not in capsys.readouterr().err, "a step that was not finished is not saved"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_states_are_found_where_runs_leave_them(tmp_path):
    run = PruneCommand(out=str(tmp_path / "r"))
    assert run.states() == []
    (tmp_path / "r").mkdir()
    for name in ("run_state", "finetune_state_0.5"):
        (tmp_path / "r" / f"{name}.safetensors").touch()
    assert [Path(p).name.partition(".")[0] for p in run.states()] == ["run_state", "finetune_state_0"]
