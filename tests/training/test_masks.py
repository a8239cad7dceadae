"""Images with a class for every pixel: files that belong together, sizes, numbers, and what changes both."""

import numpy as np
import pytest
import torch
from PIL import Image

from nvit.config import TrainingConfig
from nvit.tasks.segmentation import IGNORE
from nvit.training.folders import BrokenImage
from nvit.training.masks import Masked, joint_transform, mask_classes, pairs_in

PREPROCESS = {"input_size": (3, 16, 24), "mean": (0.0,) * 3, "std": (1.0,) * 3}


def put(folder, name: str, labels: np.ndarray, size: tuple[int, int] | None = None) -> None:
    """An image whose red is 20 times its label, and its labels."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    red = np.zeros((*labels.shape, 3), np.uint8)
    red[..., 0] = 20 * labels
    image = Image.fromarray(red)
    (image if size is None else image.resize(size)).save(folder / "images" / f"{name}.png")
    Image.fromarray(labels.astype(np.uint8)).save(folder / "labels" / f"{name}.png")


@pytest.fixture
def data(tmp_path):
    labels = np.arange(12).repeat(8).reshape(12, 8) % 3
    for split in ("train", "val"):
        put(tmp_path / split, "a", labels)
    return tmp_path


def opened(folder, training=None, ignored=IGNORE, classes=3) -> Masked:
    return Masked(pairs_in(str(folder), "train"), joint_transform(PREPROCESS, training), 3, classes, ignored)


def test_images_and_labels_have_the_models_size_and_stay_together(data):
    for training in (None, TrainingConfig()):
        torch.manual_seed(1)
        image, labels = opened(data, training)[0]
        assert image.shape == (3, 16, 24) and labels.shape == (16, 24) and labels.dtype == torch.int64
        assert (
            image.dtype == torch.float32 and type(labels) is torch.Tensor and set(labels.unique().tolist()) <= {0, 1, 2}
        )
        # Red says the label, where no edge is near.
        near = (image[0] * 255 / 20 - labels).abs() < 0.5
        assert float(near.float().mean()) > 0.6
    torch.manual_seed(1)
    again = opened(data, TrainingConfig())[0]
    assert torch.equal(again[1], labels) and torch.equal(again[0], image)


def test_a_number_may_stand_for_no_class(data):
    found = opened(data, ignored=2)[0][1]
    assert set(found.unique().tolist()) == {0, 1, IGNORE}
    assert mask_classes(str(data)) == ("0", "1", "2") and mask_classes(str(data), 2) == ("0", "1")


def test_classes_are_named_by_a_table(data):
    (data / "classes.csv").write_text("index,name\n0,sky\n1,road\n2,none\n")
    assert mask_classes(str(data), 2) == ("sky", "road") and mask_classes(str(data))[2] == "none"
    (data / "classes.csv").write_text("index,name\n1,sky\n2,road\n")
    with pytest.raises(ValueError, match="expected 0, 1, 2"):
        mask_classes(str(data))


def test_files_that_do_not_fit_are_named(data):
    put(data / "train", "b", np.zeros((4, 4)), size=(5, 4))
    with pytest.raises(BrokenImage, match=r"labels/b.png is 4 × 4 pixels, its image 5 × 4"):
        opened(data)[1]
    put(data / "train", "b", np.full((4, 4), 7))
    with pytest.raises(BrokenImage, match=r"labels/b.png holds the number 7, but there are 3 classes.*--ignore-label"):
        opened(data)[1]
    Image.new("RGB", (4, 4)).save(data / "train" / "labels" / "b.png")
    with pytest.raises(BrokenImage, match=r"labels/b.png has the mode RGB"):
        opened(data)[1]
    (data / "train" / "labels" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"labels/b.png is missing"):
        pairs_in(str(data), "train")
    with pytest.raises(ValueError, match="has no images/"):
        pairs_in(str(data / "val" / "images"), "train")
