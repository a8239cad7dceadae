"""The words of a command line: where models, recipes and flags may stand, and what is refused by name."""

import re
import subprocess

import pytest

from nvit.cli import groups
from nvit.cli import main as cli
from nvit.cli.command import flat
from nvit.cli.commands import COMMANDS
from nvit.cli.recipe import NOT_OF_A_RECIPE
from nvit.cli.words import UsageError


def settings(*args: str) -> dict:
    _, config, _ = cli.parse(args)
    return flat(config)


def refusal(*args: str) -> str:
    with pytest.raises(UsageError) as e:
        cli.parse(args)
    assert "\n" not in str(e.value)
    return str(e.value)


SAME = {
    "first": ["prune", "M", "--latency-target", "0.8", "0.6", "--no-train", "--data=x"],
    "in the middle": ["prune", "--no-train", "M", "--data=x", "--latency-target", "0.8", "0.6"],
    "after a flag of one value": ["prune", "--latency-target", "0.8", "0.6", "--no-train", "--data", "x", "M"],
    "as a flag": ["prune", "--latency-target", "0.8", "0.6", "--model", "M", "--no-train", "--data", "x"],
    "as a flag with =": ["prune", "--model=M", "--latency_target", "0.8", "0.6", "--no_train", "--data=x"],
}


@pytest.mark.parametrize("how", SAME)
def test_the_model_may_stand_anywhere(how):
    found = settings(*SAME[how])
    assert (found["model"], found["latency_target"], found["train"], found["data"]) == ("M", (0.8, 0.6), False, "x")
    assert found == settings(*SAME["first"])


@pytest.mark.parametrize("args", [["A", "B", "--data", "x"], ["--data", "x", "A", "B"], ["A", "--data", "x", "B"]])
def test_several_models_stand_together(args):
    assert settings("compare", *args)["models"] == ("A", "B")


REFUSED = {
    "taken for a kind": (["prune", "--only", "mlp", "heads", "M"], "--only: unknown value 'M'; .*before the flags"),
    "taken for a number": (["prune", "--latency-target", "0.5", "M"], "'M' is not a number; .*before the flags"),
    "taken for a group": (["prune", "--freeze", "blocks.0.*", "M"], "'M' is a value of --freeze; .*before the flags"),
    "a recipe in a list": (
        ["prune", "M", "--freeze", "emb", "r.toml"],
        "--freeze: 'r.toml' would be one of",
    ),
    "two models": (["prune", "M", "N"], "takes one MODEL, found M N"),
    "none": (["prune", "--no-train"], "MODEL is missing: .*nvit demo"),
    "none beside a list": (["prune", "--latency-target", "0.5"], "MODEL is missing"),
    "another for the demo": (["demo", "--model", "M"], "demo has no flag --model"),
    "none to compare": (["compare", "--out", "x"], "MODEL is missing: nvit compare"),
    "none to measure": (["latency"], "MODEL is missing: .*--table FILE"),
    "one for the demo": (["demo", "M"], "nvit demo takes no MODEL, found M"),
    "a recipe for the demo": (["demo", "r.toml"], "for r.toml take nvit prune"),
    "two recipes": (["prune", "a.toml", "b.toml"], "one recipe at most, found a.toml, b.toml"),
    "a flag": (["prune", "M", "--latncy-target", "0.5"], "no flag --latncy-target .did you mean '--latency-target'"),
    "no value": (["prune", "M", "--out", "--no-train"], "--out needs a value"),
    "a value too many": (["prune", "M", "--refit=yes"], "--refit takes no value"),
    "a choice": (["evaluate", "M", "--amp", "bf17"], "--amp: unknown value 'bf17' .did you mean 'bf16'"),
    "a number": (["evaluate", "M", "--batch-size", "1.5"], "--batch-size: '1.5' is not a whole number"),
    "an analysis": (
        ["analyze", "width", "M"],
        "usage: nvit analyze {widths,attention,.*'widths'",
    ),
    "a command": (["evalute", "M"], "unknown command 'evalute' .did you mean 'evaluate'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_off_is_said_by_name(what, capsys):
    args, says = REFUSED[what]
    assert re.search(says, refusal(*args))
    assert cli.main(args) == 2 and capsys.readouterr().err.count("\n") == 1


def test_negative_numbers_and_empty_values_are_values():
    assert settings("prune", "M", "--workers", "-1", "--out", "")["workers"] == -1
    assert settings("prune", "M", "--min-lr", "-1e-5")["min_lr"] == -1e-5


def test_a_recipe_may_bring_the_model_and_flags_win(tmp_path):
    (tmp_path / "r.toml").write_text('model = "M"\nlr = 2.0\nlatency-target = [0.7]\n')
    found = settings("prune", "--lr", "3", str(tmp_path / "r.toml"), "--no-train")
    assert (found["model"], found["lr"], found["latency_target"], found["train"]) == ("M", 3.0, (0.7,), False)
    assert settings("prune", str(tmp_path / "r.toml"), "N")["model"] == "N"
    (tmp_path / "e.toml").write_text('models = ["A", "B"]\n')
    assert settings("compare", str(tmp_path / "e.toml"))["models"] == ("A", "B")


def test_the_demo_is_the_recipe_of_the_digits():
    found = settings("demo", "--finetune-epochs", "1")
    assert (found["model"], found["out"], found["interval"], found["finetune_epochs"]) == ("digits", "nvit-demo", 4, 1)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_is_a_flag_in_one_group_and_few_come_first(name):
    command = COMMANDS[name]
    default = command.flags()
    settings = {name: value for name, value in flat(default).items() if command.models or name != "model"}
    view = groups.view(command)
    model = {command.models: settings[command.models]} if command.models else {}
    assert groups.settings_of(view(**model)) == settings
    assert len(command.first) <= 12 and set(command.first) <= flat(default).keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_at_80_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([*name.split(), "--help"])
    usage, *shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, shown)) <= 80 and not any("…" in line.replace(f"{COMMANDS[name].word} …", "") for line in shown)
    flags = re.findall(r"^.{0,2} --(\w[\w-]+)", "\n".join(shown), re.M)
    assert usage.startswith(f"usage: nvit {name}") and flags[0] == COMMANDS[name].first[0].replace("_", "-")


def test_the_list_of_commands_at_80_columns(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert all(f"nvit {name}" in shown for name in COMMANDS)
    with pytest.raises(SystemExit) as stop:
        cli.main(["analyze", "--help"])
    assert not stop.value.code and "correlation" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_every_command_and_flag_is_completed(shell, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--tyro-print-completion", shell])
    script = capsys.readouterr().out
    assert not stop.value.code
    for word in ("prune", "demo", "correlation", "--latency-target", "--teacher", "--choice", "--bundles"):
        assert word in script, word
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_recipe_leaves_out_what_is_no_setting_of_a_run():
    assert set(NOT_OF_A_RECIPE) <= {name for command in COMMANDS.values() for name in flat(command.flags())}
