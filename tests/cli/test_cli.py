"""The command line end to end on the bundled model and digits, and what it says to wrong input."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import nvit
from nvit.cli import main as cli
from nvit.cli.commands import COMMANDS
from nvit.cli.flags.correlation import CorrelationCommand
from nvit.cli.flags.finetune import FinetuneCommand
from nvit.cli.flags.prune import PruneCommand
from nvit.cli.recipe import from_toml
from nvit.structure import snapshot
from nvit.utils import tensors

QUICK = ("--table", "analytic", "--latency-seconds", "0.5", "--latency-batch", "16", "--device", "cpu")


@pytest.fixture(scope="module")
def pruned(once):
    """A one-shot run on the bundled model, two targets."""
    args = ["demo", "--no-train", "--finetune-epochs", "1", "--latency-target", "0.8", "0.6", *QUICK]

    def prune(folder):
        assert cli.main([*args, "--out", str(folder / "run")]) == 0

    return once("pruned_by_command", prune) / "run"


def test_prune_leaves_what_it_promises(pruned, capsys):
    result = json.loads((pruned / "result.json").read_text())
    assert result["model"] == "digits" and result["criterion"] == "curvature" and result["targets"] == [0.8, 0.6]
    assert {"params", "macs", "latency_ms", "top1"} <= result["dense"].keys()
    sizes = [result["dense"]["params"]]
    for row, target in zip(result["snapshots"], (0.8, 0.6), strict=True):
        assert {"target", "predicted_ratio", "measured_ratio", "params", "macs", "top1", "path"} <= row.keys()
        assert row["predicted_ratio"] <= target and 0 < row["top1"] <= 100
        model = nvit.load(row["path"])
        assert sum(p.numel() for p in model.parameters()) == row["params"] < sizes[-1]
        sizes.append(row["params"])
    assert not list(pruned.glob("*_state*"))
    assert (pruned / "history.csv").read_text().startswith("step,predicted_ratio")


def test_a_finished_run_is_not_overwritten(pruned, capsys):
    assert cli.main(["demo", "--out", str(pruned)]) == 1
    assert "holds a finished run" in capsys.readouterr().err


def test_evaluate_compare_widths(pruned, tmp_path, capsys):
    small = str(pruned / "target-0.6")
    assert cli.main(["evaluate", small, "--device", "cpu", "--out", str(tmp_path / "e")]) == 0
    found = json.loads((tmp_path / "e" / "result.json").read_text())
    metrics = snapshot.load_metrics(small)
    assert found["top1"] == pytest.approx(metrics["top1"]) and {"top5", "images_per_s"} <= found.keys()

    assert cli.main(["compare", "digits", small, *QUICK, "--seconds", "0.5", "--out", str(tmp_path / "c")]) == 0
    dense, other = json.loads((tmp_path / "c" / "result.json").read_text())["models"]
    assert dense["predicted_ratio"] == pytest.approx(1) and other["predicted_ratio"] == pytest.approx(
        metrics["predicted_ratio"]
    )
    assert other["peak_memory"] < dense["peak_memory"] and (tmp_path / "c" / "compare.csv").exists()

    assert cli.main(["analyze", "widths", "digits", small, "--out", str(tmp_path / "w")]) == 0
    rows = (tmp_path / "w" / "widths.csv").read_text().splitlines()
    assert rows[0] == "model,block,emb,heads,qk_dim,v_dim,mlp" and len(rows) == 1 + 2 * 4
    assert Image.open(tmp_path / "w" / "widths.png").size[0] > 500


def test_finetune_and_scratch(pruned, tmp_path):
    small = str(pruned / "target-0.6")
    args = ["--epochs", "0.2", "--device", "cpu", "--distill-weight", "1"]
    assert cli.main(["finetune", small, *args, "--teacher", "digits", "--out", str(tmp_path / "f")]) == 0
    assert cli.main(["finetune", small, *args, "--scratch", "--out", str(tmp_path / "s")]) == 0
    tuned, scratch = (json.loads((tmp_path / n / "result.json").read_text()) for n in "fs")
    assert tuned["params"] == scratch["params"] and tuned["top1"] > scratch["top1_before"]
    nvit.load(tmp_path / "s")


def test_latency_measures_then_shows(tmp_path, capsys):
    args = ["--latency-batch", "4", "--latency-seconds", "0.2", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(["latency", "digits", *args]) == 0
    measured = capsys.readouterr().out
    assert cli.main(["latency", "--table", str(tmp_path / "latency_table.json")]) == 0
    assert measured.startswith(capsys.readouterr().out.splitlines()[0])


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"nvit {name}" in shown and "--out" in shown


def test_recipe_equals_flags(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "digits"\nlatency-target = [0.7]\nlr = 1\n')
    _, config, _ = cli.parse(["prune", str(recipe), "--bundles-per-step", "4"])
    assert config == PruneCommand(
        model="digits", config=nvit.PruneConfig(latency_target=(0.7,), lr=1.0, bundles_per_step=4)
    )


def test_auto_is_hessian_while_training_and_curvature_in_one_shot():
    assert [nvit.PruneConfig(train=t).saliency for t in (True, False)] == ["hessian", "curvature"]
    assert nvit.PruneConfig(train=False, criterion="nvit").saliency == "nvit"


@pytest.mark.parametrize("path", sorted((nvit.BUNDLED.parents[2] / "recipes").rglob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_is_valid(path):
    config = from_toml(PruneCommand, path).config
    config.check()
    assert config.saliency in (("remaining",) if config.refit else ("nvit", "hessian"))


@pytest.mark.parametrize(
    ("cls", "line", "says"),
    [
        (PruneCommand, 'criterion = "hesian"', "criterion: unknown value 'hesian' (did you mean 'hessian'?)"),
        (FinetuneCommand, 'amp = "fp8"', "amp: unknown value 'fp8'"),
        (
            CorrelationCommand,
            'criterion = ["abs", "remains"]',
            "criterion: unknown value 'remains' (did you mean 'remaining'?)",
        ),
        (PruneCommand, 'latency-target = ["half"]', "latency_target is 'half', expected float"),
    ],
)
def test_a_recipe_with_a_value_nobody_knows_is_refused(cls, line, says, tmp_path):
    (tmp_path / "r.toml").write_text(line)
    with pytest.raises(ValueError, match=re.escape(says)):
        from_toml(cls, tmp_path / "r.toml")


def folder_of_images(root, classes, images=2):
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(images):
            pixels = np.random.default_rng(c * 10 + i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{c}" / f"{i}.png")
    return root


DEIT = ("--model", "deit_tiny_patch16_224", "--no-pretrained", "--table", "analytic", "--device", "cpu")


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["nonsense"], 2, "unknown command"),
        (["evaluate"], 2, "MODEL is missing"),
        (["demo", "--latency-target", "1.5"], 2, "not in (0, 1)"),
        (["demo", "--latency-target", "0.5", "--only", "mpl"], 2, "did you mean 'mlp'"),
        (["prune", "--no-such-flag"], 2, "has no flag --no-such-flag"),
        (["prune", "no_such.toml"], 2, "does not exist"),
        (["prune", "--model", "resnet18", "--no-pretrained"], 1, "Supported families"),
        (["prune", "--model", "deit_tinny"], 1, "neither a snapshot folder nor a timm model"),
        (["prune", *DEIT], 1, "--data is missing"),
        (["prune", *DEIT, "--data", "/no/such/folder"], 1, "no such folder"),
        (["prune", *DEIT, "--checkpoint", "/no/such/file.safetensors", "--data", "x"], 1, "does not exist"),
        (["demo", "--device", "gpu7"], 1, "device"),
        (["demo", "--freeze", "blocks.9.*", "--table", "analytic"], 1, "matches no group"),
        (["demo", "--no-train", "--latency-target", "0.001", "--table", "analytic"], 1, "cannot be met"),
        (["demo", "--table", "no_table.json"], 1, "no_table.json"),
        (["evaluate", "."], 1, "not a snapshot"),
    ],
)
def test_wrong_input_is_one_clear_line(args, code, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        got = cli.main(args)
    except SystemExit as stop:
        got = stop.code
    err = capsys.readouterr().err
    assert got == code
    assert says in err
    if says:
        assert err.count("\n") == 1 or err.splitlines()[-1].startswith("nvit: ")
    assert not list(tmp_path.glob("nvit-*/target-*")), "nothing half-written"


def test_unknown_recipe_key_names_the_nearest(tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text("latency_tarjet = [0.5]\n")
    assert cli.main(["prune", str(recipe)]) == 2
    assert "did you mean 'latency_target'" in capsys.readouterr().err


def test_data_without_images_and_wrong_class_count(tmp_path, capsys):
    (tmp_path / "empty" / "a").mkdir(parents=True)
    assert cli.main(["prune", *DEIT, "--data", str(tmp_path / "empty"), "--out", str(tmp_path / "o")]) == 1
    assert "images" in capsys.readouterr().err
    images = folder_of_images(tmp_path / "five", 5)
    assert cli.main(["prune", *DEIT, "--data", str(images), "--out", str(tmp_path / "o")]) == 1
    assert "5 class folders but the model has 1000 classes" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_table_of_another_setting(pruned, tmp_path, capsys):
    table = json.loads((pruned / "latency_table.json").read_text())
    setting = {
        "device": "Another GPU",
        "dtype": "float32",
        "batch_size": 16,
        "tokens": 17,
        "threads": 0,
        "versions": "",
    }
    (tmp_path / "t.json").write_text(json.dumps(table | {"setting": setting}))
    args = ["demo", "--table", str(tmp_path / "t.json"), "--latency-batch", "16", "--out", str(tmp_path / "o")]
    assert cli.main(args) == 1
    assert "measured with device Another GPU, this run has" in capsys.readouterr().err


def test_damaged_snapshot(pruned, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(pruned / "target-0.6", broken)
    weights = broken / snapshot.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    assert cli.main(["evaluate", str(broken)]) == 1
    assert "weights.safetensors is damaged" in capsys.readouterr().err


def test_nan_in_the_loss_names_the_step(tmp_path, capsys):
    model = nvit.load(nvit.BUNDLED)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[0] = float("nan")
    snapshot.save(tmp_path / "nan", model)
    args = ["prune", "--model", str(tmp_path / "nan"), "--out", str(tmp_path / "o"), *QUICK]
    assert cli.main(args) == 1
    assert "the loss is nan at step 0" in capsys.readouterr().err


def test_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    args = ["demo", "--no-train", "--out", str(tmp_path / "o"), *QUICK]
    assert cli.main(args) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "o").glob("*target*"))
