"""What a run reads, as its model sees it: one numbering for all its parts, and only training images are trained on."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import nvit
from nvit.config import TrainingConfig
from nvit.training.images import Images, Labels
from tests.hosts import make


def pictures(root, names, count=3, suffix="png"):
    for c, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((16, 16, 3), 20 * c + i, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.{suffix}")
    return root


def host(classes, **more):
    return make("plain", num_classes=classes, **more)


def labels_of(loader):
    return sorted({int(y) for _, batch in loader for y in batch})


def test_evaluation_takes_the_numbers_of_training(tmp_path):
    pictures(tmp_path / "train", ["ant", "bee", "cat"])
    pictures(tmp_path / "val", ["cat"])
    images = Images(host(3), str(tmp_path))
    assert labels_of(images.evaluation(2)) == [2]
    pictures(tmp_path / "val2", ["dog"])
    with pytest.raises(ValueError, match="'dog' that the training images do not have"):
        Images(host(3), str(tmp_path), str(tmp_path / "val2")).evaluation(2)


@pytest.mark.parametrize("splits", [["train"], ["train", "test"], []])
def test_training_images_are_not_evaluated(tmp_path, splits):
    for split in splits or [""]:
        pictures(tmp_path / split, ["ant", "bee"])
    said = []
    images = Images(host(2), str(tmp_path), say=said.append)
    assert images.evaluation(2) is None and "accuracy is not reported" in said[0]
    assert len(images.training(TrainingConfig(batch_size=2)).dataset.dataset) == 6
    if not splits:
        assert labels_of(images.evaluation(2, own=True)) == [0, 1], "who names a folder to evaluate has it evaluated"


def test_the_order_of_numbered_folders_is_asked_of_the_model(tmp_path, monkeypatch):
    names = [str(i) for i in range(11)]
    pictures(tmp_path, names)
    model, said = host(11), []
    lexical = {name: i for i, name in enumerate(sorted(names))}

    def knows(_, images):
        shown = (images.mean((1, 2, 3)).mul(0.5).add(0.5).mul(255) / 20).round().long().clamp(0, 10)
        return nn.functional.one_hot(torch.tensor([lexical[str(int(c))] for c in shown]), 11).float()

    monkeypatch.setattr("nvit.adapters.predict", knows)
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    images = Images(model, str(tmp_path), say=said.append)
    assert images.numbering().class_to_idx == lexical
    assert "lexical order" in said[0] and "100.0 % of 33 images" in said[0]
    found = Images(model, str(tmp_path), labels=Labels(order="natural")).numbering()
    assert found.class_to_idx == {n: int(n) for n in names}


def test_imagenet_models_know_synsets_also_of_few_folders(tmp_path):
    from timm.data import ImageNetInfo

    synsets = ImageNetInfo().label_names()
    pictures(tmp_path, [synsets[7], synsets[500]])
    model = host(1000)
    assert labels_of(nvit.image_folder(str(tmp_path), model, 2)) == [7, 500]


def test_channels_follow_the_model(tmp_path):
    pictures(tmp_path, ["ant", "bee"])
    batch, _ = next(iter(nvit.image_folder(str(tmp_path), host(2, in_chans=1), 2)))
    assert batch.shape[1] == 1


def test_what_is_skipped_is_said(tmp_path):
    pictures(tmp_path, ["ant", "bee"], suffix="webp")
    (tmp_path / "ant" / "list.csv").write_text("x")
    (tmp_path / "bee" / "0.webp").write_bytes(b"broken")
    said = []
    loader = Images(host(2), str(tmp_path), skip_broken=True, say=said.append).training(TrainingConfig(batch_size=2))
    assert len(loader.dataset.dataset) == 5
    assert "5 images of 2 classes" in said[0] and "1 × .csv" in said[0] and "1 broken left out" in said[0]
