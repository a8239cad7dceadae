"""Images by timm's readers and transforms, the bundled digits, and a loader whose every draw is a function of seed,
epoch and index, so that a resumed run sees what an uninterrupted one would have seen."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from .. import adapters, parallel
from ..config import TrainingConfig

DIGITS_EVAL = 360
"""So many of the bundled digits, drawn once and for all, are for evaluation."""


class Digits(Dataset):
    """The bundled 8 × 8 digits (UCI, Alpaydin & Kaynak 1998, CC BY 4.0): float `(1, 8, 8)` in [-1, 1] and the digit."""

    def __init__(self, training: bool, augment: bool = False) -> None:
        with resources.files("nvit").joinpath("bundled/digits.npz").open("rb") as f:
            pack = np.load(f)
            images, labels = pack["images"], pack["labels"]
        # The file is in the order of its writers; both parts should hold all of them.
        order = np.random.default_rng(0).permutation(len(labels))
        part = order[DIGITS_EVAL:] if training else order[:DIGITS_EVAL]
        self.images = torch.from_numpy(images[part]).float().div(8).sub(1)[:, None]
        self.labels = torch.from_numpy(labels[part]).long()
        self.classes = 10
        # Shifts by a pixel: an 8 x 8 digit has no room for more.
        self.shift = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if self.shift:
            dy, dx = (int(torch.randint(-1, 2, ())) for _ in range(2))
            padded = torch.nn.functional.pad(image, (1, 1, 1, 1), value=-1.0)
            image = padded[:, 1 + dy : 9 + dy, 1 + dx : 9 + dx]
        return image, self.labels[index]


def transform(preprocess: Mapping[str, Any], *, resize: bool = True, training: TrainingConfig | None = None):
    """timm's evaluation transform of a model, or its training transform with a recipe's augmentation."""
    size = preprocess["input_size"]
    shared = {k: preprocess[k] for k in ("mean", "std", "interpolation")} | {"input_size": size}
    if training is not None and (training.auto_augment or training.color_jitter or training.erasing):
        return create_transform(
            **shared,
            is_training=True,
            auto_augment=training.auto_augment or None,
            color_jitter=training.color_jitter or None,
            re_prob=training.erasing,
        )
    if not resize:
        normalise = transforms.Normalize(preprocess["mean"], preprocess["std"])
        return transforms.Compose([transforms.CenterCrop(size[-2:]), transforms.ToTensor(), normalise])
    return create_transform(
        **shared, crop_pct=preprocess.get("crop_pct"), crop_mode=preprocess.get("crop_mode", "center")
    )


def open_images(where: str, split: str, *, class_map: str = "", classes: int, transform) -> Dataset:
    """A labelled image set by timm's readers.

    Args:
        where: a folder of class folders, with or without a folder named like `split`, or a timm data set name with
            an optional folder, as `torch/cifar10:FOLDER`.
        classes: how many the model tells apart.

    Raises:
        ValueError: no such folder, no images, or labels that do not fit the model.
    """
    name, _, root = where.partition(":")
    if Path(where).is_dir():
        name, root = "", where
    elif "/" not in name or not name.startswith(("torch/", "hfds/", "tfds/", "wds/")):
        raise ValueError(f"data {where!r}: no such folder, and not a timm data set name as torch/cifar10")
    if class_map and not Path(class_map).is_file():
        raise ValueError(f"class map {class_map} does not exist")
    try:
        dataset = create_dataset(name, root=root or ".", split=split, class_map=class_map or None)
    except (RuntimeError, FileNotFoundError, AssertionError) as e:
        raise ValueError(f"data {where!r}: no images to read for {split} ({e})") from None
    if len(dataset) == 0:
        raise ValueError(f"data {where!r}: no images found for {split}; expected FOLDER/<class>/<image>")
    names = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or getattr(dataset, "class_to_idx", {})
    if names and not class_map and len(names) != classes:
        raise ValueError(
            f"data {where!r} has {len(names)} class folders but the model has {classes} classes. Give --class-map with "
            "the model's class names in index order, or a model with as many classes."
        )
    if names and max(names.values()) >= classes:
        raise ValueError(f"class map {class_map} numbers classes up to {max(names.values())}; the model has {classes}")
    dataset.transform = transform
    return dataset


def subset(dataset: Dataset, count: int) -> Dataset:
    return dataset if not count or count >= len(dataset) else torch.utils.data.Subset(dataset, range(count))


def seed_draws(*key: int) -> None:
    """Seed Python, NumPy and torch from a key, as (seed, step)."""
    mixed = int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0])
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    # torch.manual_seed would also queue a seed for a CUDA that may never start, at half a millisecond a call.
    torch.default_generator.manual_seed(mixed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(mixed)


@contextmanager
def _draws(*key: int):
    """Draws inside come from `key`; those outside go on as if nothing had happened."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        seed_draws(*key)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class _Seeded(Dataset):
    """Items by (epoch, position, index), each augmented by draws of its own."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int, int]):
        with _draws(self.seed, *key):
            return self.dataset[key[2]]


class _EpochBatches(Sampler):
    """Shuffled batches of one epoch from a given batch on; of each, this rank's share."""

    def __init__(self, size: int, batch_size: int, seed: int, epoch: int, start: int, repeats: int) -> None:
        order = np.random.default_rng([seed, epoch]).permutation(size).repeat(repeats)
        self.epoch, self.start, self.batch_size, self.order = epoch, start, batch_size, order

    def __len__(self) -> int:
        return max(1, len(self.order) // self.batch_size) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for b in range(self.start, self.start + len(self)):
            span = range(b * self.batch_size, min((b + 1) * self.batch_size, len(self.order)))
            yield [(self.epoch, span[i], int(self.order[span[i]])) for i in parallel.share(len(span))]


class TrainingData:
    """Batches of a data set, epoch after epoch, reproducible from any step on; the last ragged batch is left out.

    `batch_size` is that of all ranks together: the same batches for any number of them, each reads its share.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int = 0, workers: int = 0, repeats: int = 1) -> None:
        self.dataset, self.batch_size, self.seed = _Seeded(dataset, seed), batch_size, seed
        self.size, self.workers, self.repeats = len(dataset), workers, repeats

    def __len__(self) -> int:
        return max(1, self.size * self.repeats // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        batches = _EpochBatches(self.size, self.batch_size, self.seed, epoch, start, self.repeats)
        return iter(DataLoader(self.dataset, batch_sampler=batches, num_workers=self.workers))


def image_folder(
    folder: str,
    model: torch.nn.Module,
    batch_size: int,
    *,
    split: str = "train",
    class_map: str = "",
    resize: bool = True,
    seed: int = 0,
    workers: int = 0,
) -> TrainingData:
    """Shuffled batches from a folder of class folders, preprocessed as `model` wants, without augmentation.

    Raises:
        ValueError: no such folder, no images, or classes that do not fit the model.
    """
    pipeline = transform(adapters.preprocess(model), resize=resize)
    classes = adapters.classes(model)
    dataset = open_images(folder, split, class_map=class_map, classes=classes, transform=pipeline)
    return TrainingData(dataset, batch_size, seed, workers)


def shares(loader, batches: Iterator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of every batch of `loader`, or of `batches` from it.

    Raises:
        ValueError: a loader that is not `TrainingData` gives other batches on other ranks, which it must not.
    """
    batches = iter(loader) if batches is None else batches
    if isinstance(loader, TrainingData) or parallel.world() == 1:
        yield from batches
        return
    for i, (images, labels) in enumerate(batches):
        if not i:
            parallel.agree("the loader's first batch", {"images": images, "labels": labels})
        yield parallel.take((images, labels))


def endless(loader, seed: int, start: int = 0) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """`(step, batch)` from step `start` on, epoch after epoch.

    A loader that is not `TrainingData` (any sized iterable of batches) is seeded at each epoch and read from its
    beginning, so that the same steps give the same batches if its own draws follow torch's seed. With several ranks
    each must be given whole batches, the same on all, and takes its share of them.

    Raises:
        ValueError: the loader gives no batch.
    """
    step, length = start, len(loader)
    if not length:
        raise ValueError("the training loader has no batch; it needs at least one")
    while True:
        epoch, skip = divmod(step, length)
        if isinstance(loader, TrainingData):
            batches = loader.epoch(epoch, skip)
        else:
            seed_draws(seed, epoch)
            batches = iter(loader)
            for _ in range(skip):
                next(batches)
        for batch in shares(loader, batches):
            yield step, batch
            step += 1
        if step == start:
            raise ValueError("the training loader gave no batch; it needs at least one")


def evaluation_loader(dataset: Dataset, batch_size: int, workers: int = 0) -> DataLoader:
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers)
