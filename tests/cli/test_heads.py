"""New heads: classes of pixels in both orders, and classes of other images."""

import json

import numpy as np
import pytest
import torch

import nvit
from nvit import adapters
from nvit.cli import main as cli
from nvit.structure import snapshot
from tests.hosts import make
from tests.training.test_folders import picture
from tests.training.test_masks import put

CPU = ("--device", "cpu", "--workers", "0", "--batch-size", "2")
PRUNE = ("--no-train", "--latency-target", "0.7", "--bundle-heads", "1", "--bundle-mlp", "4", "--table", "analytic")
QUICK = ("--latency-seconds", "0.2", "--latency-batch", "2", "--images", "4", "--measure-seconds", "0")


@pytest.fixture(scope="module")
def world(once):
    """A classifier's snapshot, images with labels of pixels, and images in class folders 1, 2, 10."""

    def fill(folder):
        snapshot.save(folder / "dense", adapters.find(m := make("plain")).prepare(m))
        for split in ("train", "val"):
            for i in range(4):
                put(folder / "pixels" / split, str(i), np.full((16, 16), i % 3))
            for name in ("1", "2", "10"):
                for i in range(2):
                    picture(folder / "other" / split / name / f"{i}.png", value=20 * int(name), size=16)

    return once("heads", fill)


def test_pixels_in_both_orders(world, tmp_path, capsys):
    """A head, trained, pruned by the loss of pixels; and pruned first, with another image size for the head."""
    pixels = ("--task", "segmentation", "--data", str(world / "pixels"), "--ignore-label", "2")
    dense, first, later = (str(tmp_path / name) for name in ("dense", "first", "later"))
    tune = (*pixels, *CPU, "--epochs", "4", "--lr", "0.5")
    assert cli.main(["finetune", str(world / "dense"), *tune, "--out", dense]) == 0
    found = json.loads((tmp_path / "dense" / "result.json").read_text())
    assert found["metric"] == "miou" and found["miou_before"] is None and 0 <= found["pixel_accuracy"] <= 100
    prune = ["prune", dense, *pixels, *CPU, *PRUNE, *QUICK, "--refit", "--finetune-epochs", "1", "--out", first]
    assert cli.main(prune) == 0
    (small,) = json.loads((tmp_path / "first" / "result.json").read_text())["snapshots"]
    assert small["miou"] is not None and nvit.load(small["path"]).class_names == ("0", "1")
    capsys.readouterr()
    assert cli.main(["evaluate", small["path"], *pixels, *CPU]) == 0
    assert "miou" in (said := capsys.readouterr().out).lower() and "pixel" in said.lower()
    assert cli.main(["finetune", small["path"], *tune, "--img-size", "16", "24", "--out", later]) == 0
    again = nvit.load(later)
    assert again(torch.zeros(1, 3, 16, 24)).shape == (1, 2, 16, 24)


def test_a_classifier_of_other_images(world, tmp_path, capsys):
    tune = ["finetune", str(world / "dense"), "--data", str(world / "other"), *CPU, "--epochs", "1", "--distill-weight"]
    assert cli.main([*tune, "0", "--out", str(tmp_path / "no")]) == 1
    assert "nvit finetune --new-head" in capsys.readouterr().err
    assert cli.main([*tune, "0", "--new-head", "--out", str(tmp_path / "yes")]) == 0
    model = nvit.load(tmp_path / "yes")
    assert adapters.label_names(model) == {"1": 0, "2": 1, "10": 2} and adapters.classes(model) == 3
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "yes"), "--data", str(world / "other"), *CPU]) == 0
    assert cli.main([*tune, "0", "--new-head", "--task", "regression", "--out", str(tmp_path / "odd")]) == 1
    assert "task regression has neither" in capsys.readouterr().err
