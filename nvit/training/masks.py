"""Images with a class for every pixel: `images/` and `labels/`, PNG files of class numbers under the images' names."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from .. import adapters
from ..config import PruneConfig, TrainingConfig
from ..tasks.segmentation import IGNORE
from .data import TrainingData, by_channel, calibration_data, evaluation_loader, subset
from .folders import MODES, SUFFIXES, BrokenImage, natural_key, open_image, split_folder

IMAGES, LABELS, CLASSES = "images", "labels", "classes.csv"
SMALLEST_CROP = 0.5
"""Of an image's area that a training crop keeps at least."""


def pairs_in(where: str, split: str) -> list[tuple[Path, Path]] | None:
    """Every image of a split and the file of its labels; None where the folder has splits, but not this one.

    Raises:
        ValueError: no such folders, or an image without labels, by its name.
    """
    root = Path(where)
    if not root.is_dir():
        raise ValueError(f"data {where!r}: no such folder; expected one with {IMAGES}/ and {LABELS}/")
    # A folder of images/ and labels/ is one set: neither is a split.
    folder = root if (root / IMAGES).is_dir() else split_folder(root, split)
    if folder is None:
        return None
    if gone := next((name for name in (IMAGES, LABELS) if not (folder / name).is_dir()), None):
        raise ValueError(f"data {str(folder)!r} has no {gone}/; expected {IMAGES}/ and {LABELS}/ with a PNG an image")
    files = sorted(p for p in (folder / IMAGES).rglob("*") if p.suffix.lower() in SUFFIXES)
    files.sort(key=lambda p: natural_key(str(p)))
    found = [(f, folder / LABELS / f.relative_to(folder / IMAGES).with_suffix(".png")) for f in files]
    if not found:
        raise ValueError(f"data {str(folder / IMAGES)!r}: no images found")
    if gone := next((labels for _, labels in found if not labels.is_file()), None):
        raise ValueError(f"{gone} is missing; every image in {folder / IMAGES} needs its labels under the same name")
    return found


def mask_classes(where: str, ignored: int = IGNORE) -> tuple[str, ...]:
    """Names of the classes of pixels by number: as `classes.csv` (index,name) in the folder says, or numbers up to the
    largest in the training labels. Those of an ignored number at the end are none.

    Raises:
        ValueError: a table that does not count from 0, or fewer than two classes.
    """
    table = Path(where) / CLASSES
    if table.is_file():
        with table.open(newline="", encoding="utf-8") as lines:
            rows = {int(r["index"]): r["name"] for r in csv.DictReader(lines) if (r.get("index") or "").isdigit()}
        rows.pop(ignored if ignored == max(rows, default=-1) else None, None)
        if sorted(rows) != list(range(len(rows))):
            raise ValueError(f"{table}: the column index holds {sorted(rows)[:5]}; expected 0, 1, 2 … and a name each")
        names = tuple(rows[i] for i in range(len(rows)))
    else:
        pairs = pairs_in(where, "train") or []
        numbers = {int(n) for _, file in pairs for n in np.unique(read_labels(file))} - {ignored, IGNORE}
        most = max(numbers, default=-1)
        names = tuple(map(str, range(most + 1)))
    if len(names) < 2:
        raise ValueError(f"data {where!r} has {len(names)} class of pixels; a head needs 2")
    return names


def read_labels(file: Path) -> np.ndarray:
    """Class numbers of a PNG file, `(height, width)`; of one with a palette its indices.

    Raises:
        BrokenImage: it cannot be read, or has colours in place of numbers.
    """
    try:
        with Image.open(file) as image:
            if image.mode not in ("L", "P", "1", "I;16", "I"):
                raise BrokenImage(
                    f"{file} has the mode {image.mode}; labels are a class number a pixel, grey or indexed"
                )
            return np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise BrokenImage(f"{file} cannot be read as labels ({' '.join(str(e).split())})") from None


class Masked(Dataset):
    """Images of files, each with the class numbers of its pixels int64 `(height, width)`.

    Args:
        classes: how many there are.
        ignored: a number that stands for no class, besides `IGNORE`.
    """

    def __init__(
        self, pairs: Sequence[tuple[Path, Path]], pipeline: Callable, channels: int, classes: int, ignored: int
    ) -> None:
        self.pairs, self.pipeline, self.mode = list(pairs), pipeline, MODES[channels]
        self.classes, self.ignored = classes, ignored

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Raises BrokenImage where both files differ in size, or a label is no class; names the file."""
        file, labels_file = self.pairs[index]
        image, labels = open_image(file, self.mode), read_labels(labels_file).astype(np.int64)
        if labels.shape != image.size[::-1]:
            width, height = image.size
            raise BrokenImage(
                f"{labels_file} is {labels.shape[1]} × {labels.shape[0]} pixels, its image {width} × {height}; they "
                "have to be of one size"
            )
        labels[labels == self.ignored] = IGNORE
        odd = labels[(labels != IGNORE) & (labels >= self.classes)]
        if odd.size:
            raise BrokenImage(
                f"{labels_file} holds the number {odd[0]}, but there are {self.classes} classes, counted from 0; name "
                "a number that stands for no class with --ignore-label"
            )
        image, mask = self.pipeline(tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(labels)[None]))
        return image.as_subclass(Tensor), mask[0].as_subclass(Tensor)


def joint_transform(preprocess: dict[str, Any], training: TrainingConfig | None = None) -> Callable:
    """Images and labels to the model's size, whatever their shape: labels by the nearest pixel. In training a crop of
    at least half of the image and a flip, the same for both.

    Args:
        training: a recipe, of which `color_jitter` counts.
    """
    channels, *size = preprocess["input_size"]
    mean, std = (by_channel(preprocess[k], channels) for k in ("mean", "std"))
    if training is None:
        first = [v2.Resize(size, antialias=True)]
    else:
        first = [v2.RandomResizedCrop(size, (SMALLEST_CROP, 1.0), antialias=True), v2.RandomHorizontalFlip()]
        if training.color_jitter:
            first.append(v2.ColorJitter(*[training.color_jitter] * 3))
    # Only images become floats.
    dtypes = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return v2.Compose([*first, dtypes, v2.Normalize(mean, std)])


@dataclass(frozen=True, kw_only=True)
class MaskImages:
    """Training and evaluation images of a segmenter, with the methods of `images.Images`.

    Attributes:
        where, evaluated: folders with `images/` and `labels/`, with or without folders of splits; evaluation images are
            `where`'s val/ where none are named.
        ignored: a number in labels that stands for no class.
        say: called with a line wherever something was decided.
    """

    model: nn.Module
    where: str
    evaluated: str = ""
    ignored: int = IGNORE
    workers: int = 0
    say: Callable[[str], None] = lambda line: None
    unlabelled: ClassVar[None] = None

    def training(self, config: TrainingConfig, *, augment: bool = True) -> TrainingData:
        """Shuffled training batches, cropped and flipped."""
        dataset = self._open(self.where, "train", config if augment else None)
        repeats = config.repeats if augment else 1
        return TrainingData(dataset, config.batch_size, config.seed, self.workers, repeats)

    def calibration(self, config: PruneConfig) -> TrainingData:
        """What a run without training reads: `config.images` of the training images, evenly over them."""
        return calibration_data(self._open(self.where, "train"), config, self.workers)

    def evaluation(self, batch_size: int, count: int = 0, *, own: bool = False) -> DataLoader | None:
        """Evaluation batches, in order, at the model's size; None, and a line that says so, where there are no images
        but those that train.

        Args:
            count: so many images evenly over the set; 0 for all.
            own: a folder without splits is evaluated itself: nothing trains on it.
        """
        where = self.evaluated or self.where
        dataset = None
        if own or self.evaluated or not (Path(where) / IMAGES).is_dir():
            dataset = self._open(where, "validation")
        if dataset is None:
            self.say(f"{where} has no val/: nothing is evaluated; name evaluation images with --eval-data")
            return None
        return evaluation_loader(subset(dataset, count), batch_size, self.workers)

    def _open(self, where: str, split: str, training: TrainingConfig | None = None) -> Dataset | None:
        pairs = pairs_in(where, split)
        if pairs is None:
            return None
        preprocess = adapters.preprocess(self.model)
        pipeline = joint_transform(preprocess, training)
        return Masked(pairs, pipeline, preprocess["input_size"][0], adapters.classes(self.model), self.ignored)
