"""The calibration images of a one-shot run: so many of a loader's, the same ones at every pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch import Tensor

from .. import parallel
from ..config import PruneConfig
from ..refit.refit import first_held
from ..training.batches import images_of, known_length, length, parts
from ..training.data import TrainingData


def sampled(loader, config: PruneConfig) -> Iterator[Any]:
    """The batches that a run without training reads: `score_batches` of them, or as many as hold `images` images, the
    last one cut to that; all where both are 0. Of several ranks' batches none is cut."""
    if config.score_batches:
        yield from islice(loader, config.score_batches)
        return
    left = config.images
    for batch in loader:
        here = _size(loader, batch)
        if config.images and left < here and parallel.world() == 1:
            batch = _first(batch, left)
        yield batch
        left -= here
        if config.images and left <= 0:
            return


def fitted_count(loader, config: PruneConfig) -> int:
    """How many batches of `sampled` a refit fits weights to; the others it holds back. Reads all of them once."""
    return first_held(sum(1 for _ in sampled(loader, config)))


def fitted(loader, config: PruneConfig, count: int) -> Iterator[Any]:
    """The first `count` batches of `sampled`."""
    yield from islice(sampled(loader, config), count)


def fitted_images(loader, config: PruneConfig, count: int, images: int) -> list[Tensor]:
    """The first images of `fitted`, at most so many, by batch."""
    found: list[Tensor] = []
    for x in images_of(fitted(loader, config, count)):
        found.append(x[:images])
        images -= len(x)
        if images <= 0:
            break
    return found


def held_back(loader, config: PruneConfig, count: int) -> list[Tensor]:
    """The images behind them: they choose a refit's ridge, no weight is fitted to them."""
    return list(islice(images_of(sampled(loader, config)), count, None))


def count_batches(loader, config: PruneConfig) -> int:
    """How many batches `sampled` gives; 0 where neither the config nor the loader says.

    Raises:
        ValueError: one pass is asked for, and the loader has no length.
    """
    there = known_length(loader)
    if config.score_batches:
        return config.score_batches if there is None else min(config.score_batches, there)
    if not config.images:
        return length(loader, "to score one pass; set images")
    size = batch_size(loader)
    if size is None:
        return there or 0
    asked = -(-config.images // size)
    return asked if there is None else min(asked, there)


def count_images(loader, config: PruneConfig) -> int | None:
    """How many images `sampled` gives; None where only reading them would tell."""
    size, batches = batch_size(loader), count_batches(loader, config)
    if size is None or not batches:
        return None
    there = getattr(loader, "size", None) if getattr(loader, "whole", False) else None  # a last batch that is smaller
    found = min(batches * size, batches * size if there is None else there)
    return min(found, config.images) if config.images and not config.score_batches else found


def batch_size(loader) -> int | None:
    """Images of a loader's first batch; None where only reading it would tell."""
    if isinstance(size := getattr(loader, "batch_size", None), int):
        return size
    if isinstance(loader, Sequence) and loader:
        return len(parts(loader[0])[0])
    return None


def refuse_few(loader, config: PruneConfig) -> None:
    """Raise ValueError where a refit will have a single batch, as far as can be known without reading one."""
    if not config.refit or count_batches(loader, config) != 1:
        return
    if not config.score_batches and batch_size(loader) is None:
        return
    raise ValueError(
        "a refit needs 2 batches of calibration images, one to choose the ridge with, and this run has 1; give more "
        f"images or a batch_size smaller than {config.batch_size}"
    )


def _size(loader, batch: Any) -> int:
    """Images of a batch, of all ranks together."""
    return loader.batch_size if isinstance(loader, TrainingData) and parallel.world() > 1 else len(parts(batch)[0])


def _first(batch: Any, count: int) -> tuple[Tensor, Any]:
    """The first images of a batch and their labels."""
    images, labels = parts(batch)
    return images[:count], labels[:count] if isinstance(labels, Tensor) else labels
