"""Where a run is kept when nobody says: a folder of its own, however many there are."""

import json

import pytest

from nvit.cli import main as cli
from nvit.cli.command import numbered
from nvit.cli.flags.finetune import FinetuneCommand
from nvit.cli.flags.prune import PruneCommand

QUICK = ("--table", "analytic", "--latency-seconds", "0.2", "--latency-batch", "4", "--device", "cpu")
FAST = (*QUICK, "--no-train", "--criterion", "magnitude", "--finetune-epochs", "0", "--eval-images", "16")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_are_numbered_and_none_is_written_over(here, capsys):
    args = ["prune", "digits", *FAST]
    assert cli.main(args) == cli.main([*args, "--latency-target", "0.7"]) == 0
    said = capsys.readouterr().out
    assert "nvit-run/result.json" in said and "nvit-run-2/result.json" in said
    targets = [json.loads((here / n / "result.json").read_text())["targets"] for n in ("nvit-run", "nvit-run-2")]
    assert targets == [[0.5], [0.7]]
    (here / "r.toml").write_text('model = "digits"\nout = "nvit-run"\n')
    assert cli.main(["prune", str(here / "r.toml"), *FAST]) == 1, "a name that was given is kept"
    assert "holds a finished run" in capsys.readouterr().err


def test_what_counts_as_taken(here):
    assert numbered(PruneCommand()).out == numbered(PruneCommand(resume=True)).out == "nvit-run"
    (here / "nvit-run").mkdir()
    assert numbered(PruneCommand()).out == "nvit-run", "an empty folder is free"
    (here / "nvit-run" / "history.csv").touch()
    (here / "nvit-run-2").mkdir()
    (here / "nvit-run-2" / "run_state.safetensors").touch()
    assert numbered(PruneCommand()).out == "nvit-run-3"
    assert numbered(PruneCommand(resume=True)).out == "nvit-run-2", "the last one goes on"
    (here / "nvit-finetuned_state.safetensors").touch()
    assert numbered(FinetuneCommand()).out == "nvit-finetuned-2"


def test_a_dumped_recipe_does_the_same_again(here, capsys):
    args = ["prune", "digits", *FAST, "--latency-target", "0.8", "0.7", "--freeze", "blocks.0.*", "--seed", "3"]
    assert cli.main([*args, "--dump-config", "again.toml", "--out", "a"]) == 0
    text = (here / "again.toml").read_text()
    assert text.startswith("# nvit prune again.toml") and 'freeze = ["blocks.0.*"]' in text and "out =" not in text
    assert cli.main(["prune", "again.toml", "--out", "b"]) == 0
    a, b = (json.loads((here / n / "result.json").read_text()) for n in "ab")
    (a["recipe"].pop("out"), b["recipe"].pop("out"), a["recipe"].pop("dump_config"), b["recipe"].pop("dump_config"))
    assert a["recipe"] == b["recipe"]
    assert (here / "a" / "history.csv").read_text() == (here / "b" / "history.csv").read_text()
    weights = [(here / n / "target-0.7" / "weights.safetensors").read_bytes() for n in "ab"]
    assert weights[0] == weights[1]
