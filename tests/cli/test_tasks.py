"""Commands on models whose outputs are no classes."""

import csv
import json

import pytest
import torch

from nvit.adapters import find
from nvit.cli import main as cli
from nvit.structure import snapshot
from tests.hosts import make
from tests.training.test_folders import picture

QUICK = ("--table", "analytic", "--latency-seconds", "0.2", "--latency-batch", "2", "--device", "cpu")
PRUNE = ("--no-train", "--latency-target", "0.7", "--bundle-heads", "1", "--bundle-mlp", "4", "--batch-size", "4")
SCORED = {"regression": ("mae", 1), "multilabel": ("mAP", 3), "features": ("cosine", 0)}


@pytest.fixture
def world(tmp_path):
    """A folder of images, tables of their outputs, and a snapshot by task."""
    g = torch.Generator().manual_seed(0)
    names = [f"{i}.png" for i in range(8)]
    for i, name in enumerate(names):
        picture(tmp_path / "data" / name, value=30 * i, size=16)
    for task, (_, outputs) in SCORED.items():
        snapshot.save(tmp_path / f"dense_{task}", find(m := make("plain", num_classes=outputs)).prepare(m), {})
        with (tmp_path / f"{task}.csv").open("w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["file", *(f"out{i}" for i in range(outputs))])
            for name in names:
                values = torch.randn(outputs, generator=g)
                writer.writerow(
                    [name, *(values > 0).int().tolist()] if task == "multilabel" else [name, *values.tolist()]
                )
    return tmp_path


@pytest.mark.parametrize("task", SCORED)
def test_prune_evaluate_finetune_sparsify_compare(world, task, capsys):
    metric, outputs = SCORED[task]
    dense, data, out = str(world / f"dense_{task}"), ["--data", str(world / "data")], world / "out"
    if outputs:
        data += ["--targets", str(world / f"{task}.csv"), "--eval-targets", str(world / f"{task}.csv")]
    evaluated = [*data, "--eval-data", str(world / "data")]
    named = ["--task", task]
    assert cli.main(["prune", "--model", dense, *named, *evaluated, *PRUNE, *QUICK, "--refit", "--out", str(out)]) == 0
    found = json.loads((out / "result.json").read_text())
    (small,) = found["snapshots"]
    assert small[metric] is not None and found["dense"][metric] is not None and "top1" not in small
    small = small["path"]
    tune = ["finetune", small, *named, *evaluated, "--teacher", dense, "--epochs", "1", "--batch-size", "4"]
    assert cli.main([*tune, "--device", "cpu", "--out", str(world / "tuned")]) == 0
    assert json.loads((world / "tuned" / "result.json").read_text())[metric] is not None
    sparse = ["sparsify", small, *named, *evaluated, "--choice", "curvature", "--images", "8", "--latency-batch", "2"]
    assert cli.main([*sparse, "--permute-seconds", "1", "--device", "cpu", "--out", str(world / "sparse")]) == 0
    assert json.loads((world / "sparse" / "result.json").read_text())[f"{metric}_dense"] is not None
    comparing = ["compare", dense, small, *named, *data, *QUICK, "--seconds", "0.2", "--out", str(world / "c")]
    assert cli.main(comparing) == 0
    rows = json.loads((world / "c" / "result.json").read_text())["models"]
    assert all(row[metric] is not None for row in rows)
    capsys.readouterr()
    code = cli.main(["evaluate", small, *named, *data, "--device", "cpu"])
    said = capsys.readouterr()
    assert code == (0 if outputs else 1)
    assert outputs or "nvit compare DENSE SNAPSHOT" in said.err


@pytest.mark.parametrize(
    ("task", "args", "said"),
    [
        ("regression", (), "take --task regression"),
        ("regression", ("--task", "regression"), "--targets is missing"),
        ("regression", ("--task", "regression", "--class-map", "x"), "--class-map is about class folders"),
        ("features", ("--targets", "x.csv"), "task features reads none"),
        ("multilabel", ("--targets", "x.csv"), "--targets goes with --task multilabel"),
        ("features", ("--task", "regression"), "take --task features"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_written(world, task, args, said, capsys):
    command = ["prune", "--model", str(world / f"dense_{task}"), "--data", str(world / "data"), *args, *PRUNE, *QUICK]
    assert cli.main([*command, "--out", str(world / "none")]) == 1
    found = capsys.readouterr().err
    assert said in found and len(found.strip().splitlines()) == 1
    assert not (world / "none").exists() or not list((world / "none").iterdir())
