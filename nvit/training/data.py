"""Images of folders and of timm's data sets, and a loader whose every draw is a function of seed, epoch and index, so
that a resumed run sees what an uninterrupted one would have seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision import transforms

from .. import parallel
from ..config import PruneConfig, TrainingConfig
from .batches import Loader, length, parts
from .classes import names_of
from .folders import ImageFiles, find_broken, scan, split_folder
from .labels import mapped, numberings, read_class_map
from .timm_sets import timm_images
from .workers import processes


def transform(
    preprocess: Mapping[str, Any], *, resize: bool = True, training: TrainingConfig | None = None
) -> Callable[[Any], Tensor]:
    """timm's evaluation transform of a model, or its training transform with a recipe's augmentation.

    >>> pipeline = nvit.data.transform(nvit.adapters.preprocess(nvit.load(nvit.BUNDLED)))
    >>> pipeline(PIL.Image.new("L", (32, 32))).shape
    torch.Size([1, 8, 8])
    """
    size = preprocess["input_size"]
    mean, std = (by_channel(preprocess[k], size[0]) for k in ("mean", "std"))
    shared = {"mean": mean, "std": std, "interpolation": preprocess["interpolation"], "input_size": size}
    if training is not None and (training.auto_augment or training.color_jitter or training.erasing):
        return create_transform(
            **shared,
            is_training=True,
            auto_augment=training.auto_augment or None,
            color_jitter=training.color_jitter or None,
            re_prob=training.erasing,
        )
    if not resize:
        normalise = transforms.Normalize(mean, std)
        return transforms.Compose([transforms.CenterCrop(size[-2:]), transforms.ToTensor(), normalise])
    return create_transform(
        **shared, crop_pct=preprocess.get("crop_pct"), crop_mode=preprocess.get("crop_mode", "center")
    )


def by_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A mean or deviation for every channel; their mean where a model has other channels than its config speaks of."""
    values = tuple(values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def open_images(
    where: str,
    split: str,
    *,
    classes: int,
    transform: Callable | None,
    class_map: str = "",
    numbering: Mapping[str, int] | None = None,
    channels: int = 3,
    skip_broken: bool = False,
) -> Dataset | None:
    """A labelled image set: a folder of class folders, or one of timm's data sets.

    Args:
        where: a folder of class folders, with or without folders of splits (train/, val/, in any case), or a timm data
            set name with an optional folder, as `torch/cifar10:FOLDER`.
        split: `train`, or `validation`, of which a folder may have none.
        classes: how many the model tells apart.
        numbering: class numbers by folder name; by the class map, or else in natural order, where not given.
        channels: of the images handed out.
        skip_broken: leave out files that cannot be decoded, which reads each of them once.

    Returns:
        None where the folder has splits, but none to evaluate on.

    Raises:
        ValueError: no such folder, no images, or labels that do not fit the model.

    >>> for name in ("cat", "dog"):
    ...     Path(f"pets/val/{name}").mkdir(parents=True)
    ...     PIL.Image.new("RGB", (32, 32)).save(f"pets/val/{name}/0.png")
    >>> pets = nvit.data.open_images("pets", "validation", classes=2, transform=None)
    >>> [label for image, label in pets]
    [0, 1]
    """
    if not Path(where).is_dir():
        dataset = timm_images(where, split, class_map, transform, channels)
        if (names := names_of(dataset)) and not class_map and len(names) != classes:
            raise ValueError(
                f"data {where!r} has {len(names)} classes but the model has {classes}; give a model of these, or nvit "
                "finetune --new-head for a head of them"
            )
        return dataset
    if (folder := split_folder(Path(where), split)) is None:
        return None
    found = scan(folder)
    if numbering is None:
        if class_map:
            numbering = mapped(found.names, read_class_map(class_map), class_map, classes).class_to_idx
        else:
            numbering = numberings(found.names, classes)[0].class_to_idx
    elif unknown := sorted(set(found.names) - set(numbering)):
        raise ValueError(
            f"{folder} has a class {unknown[0]!r} that the training images do not have; rename or remove it"
        )
    broken = find_broken(found, channels) if skip_broken else ()
    return ImageFiles(found, numbering, transform=transform, channels=channels, broken=broken)


def subset(dataset: Dataset, count: int) -> Dataset:
    """`count` items evenly over the data set, in its order; all of them for 0."""
    if not count or count >= len(dataset):
        return dataset
    return Subset(dataset, spread(len(dataset), count))


def spread(size: int, count: int) -> list[int]:
    """`count` positions evenly over `size`: of files in class order, over all classes."""
    count = min(size, count)
    return [size * i // count for i in range(count)]


def seed_draws(*key: int) -> None:
    """Seed Python, NumPy and torch from a key, as (seed, step).

    >>> first, again = ((nvit.data.seed_draws(0, 7), torch.rand(2))[1] for _ in range(2))
    >>> torch.equal(first, again)
    True
    """
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

    def __init__(self, order: np.ndarray, batch_size: int, epoch: int, start: int, batches: int) -> None:
        self.epoch, self.start, self.batch_size, self.order = epoch, start, batch_size, order
        self.batches = batches

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for b in range(self.start, self.start + len(self)):
            span = range(b * self.batch_size, min((b + 1) * self.batch_size, len(self.order)))
            yield [(self.epoch, span[i], int(self.order[span[i]])) for i in parallel.share(len(span))]


class TrainingData:
    """Batches of a data set, epoch after epoch, reproducible from any step on; the last ragged batch is left out.

    `batch_size` is that of all ranks together: the same batches for any number of them, each reads its share.

    Args:
        whole: the last batch comes too, however small.

    >>> loader = nvit.data.TrainingData(nvit.data.Digits(training=True), batch_size=64, seed=1)
    >>> third, again = (next(loader.epoch(0, start=2))[0] for _ in range(2))
    >>> torch.equal(third, again)
    True
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        repeats: int = 1,
        *,
        whole: bool = False,
    ) -> None:
        self.dataset, self.batch_size, self.seed = _Seeded(dataset, seed), batch_size, seed
        self.size, self.workers, self.repeats, self.whole = len(dataset), workers, repeats, whole

    def __len__(self) -> int:
        images = self.size * self.repeats
        return max(1, -(-images // self.batch_size) if self.whole else images // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one epoch, from its batch `start` on."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.size).repeat(self.repeats)
        batches = _EpochBatches(order, self.batch_size, epoch, start, len(self))
        return iter(DataLoader(self.dataset, batch_sampler=batches, **processes(self.workers)))


def shares(loader: Loader, batches: Iterator | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """This rank's share of every batch of `loader`, or of `batches` from it, as images and labels (None where a batch
    has none).

    Raises:
        ValueError: a loader that is not `TrainingData` gives other batches on other ranks, which it must not.

    >>> [(len(images), labels) for images, labels in nvit.data.shares([torch.zeros(2, 1, 8, 8)])]
    [(2, None)]
    """
    batches = iter(loader) if batches is None else batches
    alone = isinstance(loader, TrainingData) or parallel.world() == 1
    for i, batch in enumerate(batches):
        images, labels = parts(batch)
        if alone:
            yield images, labels
            continue
        held = {"images": images} | ({} if labels is None else {"labels": labels})
        if not i:
            parallel.agree("the loader's first batch", held)
        mine = dict(zip(held, parallel.take(tuple(held.values())), strict=True))
        yield mine["images"], mine.get("labels")


def endless(loader: Loader, seed: int, start: int = 0) -> Iterator[tuple[int, tuple[Tensor, Tensor | None]]]:
    """`(step, batch)` from step `start` on, epoch after epoch.

    A loader that is not `TrainingData` (any sized iterable of batches) is seeded at each epoch and read from its
    beginning, so that the same steps give the same batches if its own draws follow torch's seed. With several ranks
    each must be given whole batches, the same on all, and takes its share of them.

    Raises:
        ValueError: the loader gives no batch.
    """
    step = start
    batches_each = length(loader, "to tell epochs apart while training; wrap it in a loader with one")
    if not batches_each:
        raise ValueError("the training loader has no batch; it needs at least one")
    while True:
        epoch, skip = divmod(step, batches_each)
        if isinstance(loader, TrainingData):
            batches = loader.epoch(epoch, skip)
        else:
            seed_draws(seed, epoch)
            batches = iter(loader)
            for _ in range(skip):
                next(batches)
        for images, labels in shares(loader, batches):
            yield step, (images, labels)
            step += 1
        if step == start:
            raise ValueError("the training loader gave no batch; it needs at least one")


def calibration_data(dataset: Dataset, config: PruneConfig, workers: int = 0) -> TrainingData:
    """`config.images` items evenly over the data set, or all of it for 0, shuffled, every one of them (in one process:
    of several each needs its share of the last batch); where the config counts batches, shuffled batches as training
    gives them."""
    if config.score_batches:
        return TrainingData(dataset, config.batch_size, config.seed, workers)
    return TrainingData(
        subset(dataset, config.images), config.batch_size, config.seed, workers, whole=parallel.world() == 1
    )


def evaluation_loader(dataset: Dataset, batch_size: int, workers: int = 0) -> DataLoader:
    """Batches in the order of the data set, all of it, the last one ragged.

    >>> [len(labels) for images, labels in nvit.data.evaluation_loader(nvit.data.Digits(False), 100)]
    [100, 100, 100, 60]
    """
    return DataLoader(dataset, batch_size=batch_size, **processes(workers))
