"""Images without labels: flat folders, lists, and what reads them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import nvit
from nvit.cli import main as cli
from nvit.training.images import Images
from nvit.training.unlabelled import without_labels
from tests.hosts import make
from tests.runs import config, table


def flat(root, count=12, side=24, mode="RGB"):
    root.mkdir(parents=True, exist_ok=True)
    shape = (side, side, 3) if mode == "RGB" else (side, side)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, shape, dtype=np.uint8)
        Image.fromarray(pixels, mode).save(root / f"{i}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return flat(tmp_path / "flat")


@pytest.fixture
def listed(folder, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# mine\n" + "\n".join(f"flat/{i}.png" for i in range(0, 12, 2)) + "\n")
    return path


def test_what_holds_no_labels(folder, listed, tmp_path):
    assert len(without_labels(str(folder)).files) == 12
    assert [p.name for p, _ in without_labels(str(listed)).files] == [f"{i}.png" for i in range(0, 12, 2)]
    flat(tmp_path / "split" / "train", 3)
    assert len(without_labels(str(tmp_path / "split")).files) == 3
    flat(tmp_path / "classes" / "a", 2)
    flat(tmp_path / "classes" / "b", 2)
    assert without_labels(str(tmp_path / "classes")) is None and without_labels("torch/cifar10") is None


def test_images_to_evaluate_alone_are_no_training_images(tmp_path, capsys):
    """A folder with `val/` but no `train/` is evaluated; what trains on it is told."""
    for name in "ab":
        flat(tmp_path / "val" / name, 2, 32)
    assert without_labels(str(tmp_path)) is None
    images = Images(make("plain", num_classes=2), str(tmp_path))
    assert len(images.evaluation(2).dataset) == 4
    with pytest.raises(ValueError, match="has val/ but no train/; name the folder of training images itself"):
        images.training(config())


def test_a_list_with_a_missing_file_or_none_is_one_line(tmp_path):
    (tmp_path / "l.txt").write_text("gone.png\n")
    with pytest.raises(ValueError, match=r"lists '.*gone\.png', which does not exist"):
        without_labels(str(tmp_path / "l.txt"))
    (tmp_path / "e.txt").write_text("\n")
    with pytest.raises(ValueError, match="lists no image"):
        without_labels(str(tmp_path / "e.txt"))
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="not a list of image paths"):
        without_labels(str(tmp_path / "b.bin"))


@pytest.mark.parametrize("kind", ["folder", "listed"])
def test_a_run_that_reads_no_labels_is_calibrated_on_them(kind, request):
    where, model = request.getfixturevalue(kind), make("plain")
    asked, said = config(train=False, images=5, latency_target=(0.8,)), []
    images = Images(model, str(where), say=said.append)
    batches = list(images.calibration(asked))
    assert sum(len(b) for b in batches) == 5 and all(isinstance(b, torch.Tensor) for b in batches)
    assert len(said) == 1 and "images without labels: no accuracy on them is reported" in said[0]
    assert images.evaluation(8) is None
    result = nvit.prune(model, images.calibration(asked), asked, table(model, asked))
    assert result.snapshots[0].met
    sampled = config(train=False, criterion="fisher", labels="sampled", images=5, latency_target=(0.8,))
    model = make("plain")
    assert nvit.prune(model, Images(model, str(where)).calibration(sampled), sampled, table(model, sampled)).masks


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({}, "training reads labels"),
        ({"train": False, "criterion": "fisher"}, "criterion fisher reads labels"),
        ({"train": False, "finetune_epochs": 1.0}, "finetuning reads labels"),
    ],
)
def test_a_run_that_reads_labels_is_refused(more, why, folder):
    images, asked = Images(make("plain"), str(folder)), config(**more)
    with pytest.raises(ValueError, match=f"images without labels, but {why}; give class folders, or prune with"):
        images.training(asked) if asked.train else images.calibration(asked)


def test_python_reads_a_flat_folder_and_a_list(folder, listed):
    model = make("plain")
    for where, count in ((folder, 12), (listed, 6)):
        data = nvit.image_folder(str(where), model, batch_size=4)
        assert sum(len(batch) for batch in data) == count // 4 * 4
    with pytest.raises(ValueError, match="no such folder"):
        nvit.image_folder(str(folder) + "x", model, batch_size=4)


def test_the_command_reports_no_accuracy_and_says_so(tmp_path, capsys):
    where, out = flat(tmp_path / "flat", 12, 8, "L"), tmp_path / "run"
    args = ["prune", "--model", "digits", "--data", str(where), "--no-train", "--batch-size", "4", "--device", "cpu"]
    args += ["--table", "analytic", "--latency-seconds", "0.1", "--latency-batch", "4"]
    assert cli.main([*args, "--out", str(out)]) == 0
    found, said = json.loads((out / "result.json").read_text()), capsys.readouterr()
    assert found["dense"]["top1"] is None and found["snapshots"][0]["top1"] is None and found["snapshots"][0]["met"]
    assert "12 images without labels: no accuracy on them is reported" in said.err
    assert "calibrated on 12 images, which are few: DeiT-Ti at 0.65" in said.err
    assert cli.main([*args, "--criterion", "fisher", "--out", str(tmp_path / "other")]) == 1
    assert "criterion fisher reads labels" in capsys.readouterr().err
