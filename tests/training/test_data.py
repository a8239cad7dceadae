"""Batches are a function of seed, epoch and index; folders that do not fit are refused with the reason."""

import importlib.machinery
import io
import os
import random
import signal
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nvit.config import TrainingConfig
from nvit.training.data import TrainingData, endless, evaluation_loader, open_images, subset, transform
from nvit.training.digits import Digits

PREPROCESS = {
    "input_size": (3, 24, 24),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.2),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}


class Noisy(Dataset):
    """Items that draw from all three generators, as augmentations do."""

    def __init__(self, size: int = 23) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int):
        return torch.tensor([i, random.random(), float(np.random.rand()), float(torch.rand(()))]), i


def rows(batches) -> torch.Tensor:
    return torch.cat([x for x, _ in batches])


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("epoch", [0, 2])
def test_an_epoch_can_start_anywhere(epoch, start):
    data = TrainingData(Noisy(), 5, seed=4)
    whole = list(data.epoch(epoch))
    assert len(whole) == len(data) == 4, "the last ragged batch is left out"
    assert torch.equal(rows(data.epoch(epoch, start)), rows(whole[start:]))


def test_an_epoch_is_shuffled_without_repeats_and_differs_from_the_next():
    data = TrainingData(Noisy(), 5, seed=4)
    first, second, other = rows(data.epoch(0)), rows(data.epoch(1)), rows(TrainingData(Noisy(), 5, seed=5).epoch(0))
    assert len(first[:, 0].unique()) == 20 and first[:, 0].tolist() != sorted(first[:, 0].tolist())
    for another in (second, other):
        assert not torch.equal(first[:, 0], another[:, 0])
    draws = {int(i): tuple(d) for i, *d in first.tolist()}
    again = {int(i): tuple(d) for i, *d in second.tolist()}
    assert all(draws[i] != again[i] for i in draws.keys() & again.keys()), "the same augmentation in every epoch"


def test_workers_change_nothing():
    each = [rows(TrainingData(Noisy(11), 4, seed=1, workers=w).epoch(1)) for w in (0, 2)]
    assert torch.equal(*each)


def test_repeats_come_together_with_draws_of_their_own():
    data = TrainingData(Noisy(8), 6, repeats=3)
    assert len(data) == 4
    got = rows(data.epoch(0))
    assert got[:, 0].unique(return_counts=True)[1].tolist() == [3] * 8
    assert got[0, 0] == got[1, 0] == got[2, 0] and len(got[:3, 3].unique()) == 3


def test_fewer_images_than_a_batch_are_one_small_batch():
    data = TrainingData(Noisy(3), 8)
    assert len(data) == 1 and len(rows(data.epoch(0))) == 3


def test_reading_leaves_the_draws_outside_alone():
    def draws():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seeded():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    seeded()
    expected = draws()
    seeded()
    _ = TrainingData(Noisy(), 5).dataset[0, 0, 3]
    assert draws() == expected


@pytest.mark.parametrize("start", [0, 2, 4, 9])
@pytest.mark.parametrize("kind", ["training data", "plain loader"])
def test_endless_resumes_where_it_stopped(kind, start):
    def fresh():
        if kind == "training data":
            return TrainingData(Noisy(), 5, seed=2)
        return DataLoader(TensorDataset(torch.arange(20.0)[:, None], torch.arange(20)), 5, shuffle=True)

    def read(start, stop):
        torch.rand(start)  # what was drawn before must not matter
        out = []
        for step, (x, _) in endless(fresh(), 7, start):
            if step >= stop:
                return out
            out.append((step, x))

    whole, rest = read(0, 12), read(start, 12)
    assert [s for s, _ in whole] == list(range(12))
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(whole[start:], rest, strict=True))


def test_a_loader_without_batches_is_an_error_not_a_loop():
    class Lying:
        def __len__(self):
            return 3

        def __iter__(self):
            return iter(())

    for loader in (DataLoader(TensorDataset(torch.ones(0, 1))), Lying()):
        with pytest.raises(ValueError, match="the training loader"):
            next(endless(loader, 0))


@pytest.fixture
def folder(tmp_path):
    """ImageFolder layout: 3 classes of 4 images, in train/ and val/."""
    for split, count in (("train", 4), ("val", 2)):
        for c, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((30, 40, 3), 60 * c + i, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_folders_with_and_without_splits_are_read(folder):
    made = transform(PREPROCESS)
    assert len(open_images(str(folder), "train", classes=3, transform=made)) == 12
    assert len(open_images(str(folder), "val", classes=3, transform=made)) == 6
    flat = open_images(str(folder / "train"), "val", classes=3, transform=made)
    assert len(flat) == 12
    image, label = flat[5]
    assert image.shape == (3, 24, 24) and label == 1
    level = ((60 + 1) / 255 - torch.tensor(PREPROCESS["mean"])) / 0.2
    torch.testing.assert_close(image.mean((1, 2)), level, rtol=0, atol=1e-3)


def test_a_class_map_orders_the_classes(folder, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("cat\nbee\nant\nunseen\n")
    data = open_images(str(folder), "val", class_map=str(names), classes=4, transform=transform(PREPROCESS))
    assert sorted({label for _, label in data}) == [0, 1, 2]
    by_name = {path.parent.name: label for path, label in data.files}
    assert by_name == {"cat": 0, "bee": 1, "ant": 2}


def refused(where, message, **more):
    kwargs = {"classes": 3, "transform": None} | more
    with pytest.raises(ValueError, match=message) as e:
        open_images(str(where), "train", **kwargs)
    assert "\n" not in str(e.value)


def test_unusable_folders_are_refused_with_the_reason(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "train" / "ant").mkdir(parents=True)
    refused(tmp_path / "absent", "no such folder")
    refused(tmp_path / "empty", "no images")
    refused(tmp_path / "bare", "no images")
    refused("cifar10", "no such folder, and not a timm data set name")
    refused(folder, "has 3 class folders but the model has 7 classes.*--class-map", classes=7)
    refused(folder, r"class map .*nowhere.txt does not exist", class_map=str(tmp_path / "nowhere.txt"))
    (tmp_path / "map.txt").write_text("".join(f"class{i}\n" for i in range(9)) + "ant\nbee\ncat\n")
    refused(folder, "numbers classes up to 11; the model has 3", class_map=str(tmp_path / "map.txt"))


def test_without_resizing_the_centre_is_cropped(folder):
    image = Image.fromarray(np.arange(30 * 40, dtype=np.uint32).reshape(30, 40).astype(np.uint8)).convert("RGB")
    got = transform(PREPROCESS, resize=False)(image)
    pixels = torch.from_numpy(np.array(image)[3:27, 8:32]).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(PREPROCESS[k]).view(3, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close(got, (pixels - mean) / std)


def test_augmentation_draws_only_when_the_recipe_asks_for_it(folder):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    plain = transform(PREPROCESS, training=TrainingConfig())
    assert torch.equal(plain(image), plain(image))
    for recipe in ({"auto_augment": "rand-m9-mstd0.5-inc1"}, {"color_jitter": 0.4}, {"erasing": 1.0}):
        augmented = transform(PREPROCESS, training=TrainingConfig(**recipe))
        assert augmented(image).shape == (3, 24, 24)
        assert not torch.equal(augmented(image), augmented(image)), recipe


def test_the_bundled_digits_are_split_normalised_and_shifted():
    training, evaluation, shifted = Digits(True), Digits(False), Digits(True, augment=True)
    assert (len(training), len(evaluation)) == (1437, 360) and training.classes == 10
    image, label = training[0]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32 and 0 <= int(label) < 10
    assert training.images.min() == -1 and training.images.max() == 1
    assert set(evaluation.labels.tolist()) == set(range(10))
    seen = torch.stack([shifted[0][0] for _ in range(40)])
    assert len(seen.unique(dim=0)) > 4 and bool((seen == image).flatten(1).all(1).any())


def test_evaluation_reads_in_order_and_all_of_it():
    data = TensorDataset(torch.arange(10), torch.arange(10))
    got = [x.tolist() for x, _ in evaluation_loader(subset(data, 7), 3)]
    assert got == [[0, 1, 2], [4, 5, 7], [8]], "evenly over the set"
    assert subset(data, 0) is data and len(subset(data, 99)) == 10


STREAM = "is a stream without an order or a length, .* write it out as FOLDER/<class>/<image>, or give a loader"


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("wds/imagenet:/data", STREAM),
        ("tfds/mnist", STREAM),
        ("hfids/cifar10", STREAM),
        ("hfds/cifar10", "read by Hugging Face's datasets, which is missing: pip install datasets"),
        ("imagenet/train", "no such folder, and not a timm data set name"),
        ("torch/nothing_like_it", "no images to read for train .*Unknown torchvision dataset"),
        ("torch/cifar10:/nowhere", "no images to read for train"),
    ],
)
def test_data_sets_that_cannot_be_read_say_what_to_do(where, says, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=says) as e:
        open_images(where, "train", classes=10, transform=None)
    assert "\n" not in str(e.value) and not "".join(capfd.readouterr())


class TwoImages:
    """As much of Hugging Face's `datasets.Dataset` as is read."""

    def __init__(self, *images: bytes) -> None:
        self.images = images
        label = types.SimpleNamespace(names=["cat", "dog"])
        self.info = types.SimpleNamespace(features={"label": label}, splits=None)

    def cast_column(self, name, feature):
        return self

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": {"bytes": self.images[i], "path": None}, "label": i % 2}


def test_hugging_face_data_sets_are_read_in_the_models_channels(monkeypatch):
    png = io.BytesIO()
    Image.fromarray(np.full((30, 30, 3), 255, np.uint8)).save(png, "png")
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_dataset = lambda name, split, cache_dir: TwoImages(png.getvalue(), b"not an image")
    module.Image = lambda decode: None
    monkeypatch.setitem(sys.modules, "datasets", module)
    pipeline = transform(PREPROCESS | {"input_size": (1, 24, 24)})
    data = open_images("hfds/pets", "train", classes=2, transform=pipeline, channels=1)
    image, label = data[0]
    assert image.shape == (1, 24, 24) and label == 0 and len(data) == 2
    with pytest.raises(RuntimeError):
        data[1]  # and not the first image under its number


def test_loading_processes_leave_ctrl_c_to_the_one_that_started_them():
    batches = TrainingData(Noisy(), 2, workers=1).epoch(0)
    first = next(batches)
    os.kill(batches._workers[0].pid, signal.SIGINT)
    assert len([first, *batches]) == 11
