"""What a batch of any loader holds: images, and labels where it has some."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

Loader = Iterable[Any]
"""Batches of any form that `parts` reads: a DataLoader, `TrainingData`, a list. Training needs its length as well."""

IMAGES, LABELS = ("pixel_values", "image", "images", "x"), ("labels", "label", "target", "targets", "y")


def parts(batch: Any) -> tuple[Tensor, Any | None]:
    """Images `(batch, …)` and labels of a batch: a pair, a dict, or images alone.

    Raises:
        ValueError: something else, named.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        image = next((k for k in IMAGES if k in batch), None)
        label = next((k for k in LABELS if k in batch), None)
        if image is None:
            raise ValueError(f"a batch is a dict of {', '.join(map(str, batch))}; expected images under {IMAGES[0]!r}")
        return batch[image], None if label is None else batch[label]
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return batch[0], batch[1] if len(batch) > 1 else None
    raise ValueError(
        f"a batch is a {type(batch).__name__}; expected images, (images, labels), or a dict with {IMAGES[0]!r}"
    )


def labelled(batch: Any) -> tuple[Tensor, Any]:
    """`parts` of a batch that must have labels.

    Raises:
        ValueError: it has none.
    """
    images, labels = parts(batch)
    if labels is None:
        raise ValueError("a batch holds images alone, but labels are read here; give a loader of (images, labels)")
    return images, labels


def images_of(batches: Any) -> Iterator[Tensor]:
    """The images of every batch."""
    for batch in batches:
        yield parts(batch)[0]


def length(loader: Any, why: str) -> int:
    """How many batches a loader has.

    Raises:
        ValueError: it does not say, as loaders of iterable data sets; `why` ends the line.
    """
    if (found := known_length(loader)) is None:
        raise ValueError(f"the loader ({type(loader).__name__}) has no length, which is needed {why}")
    return found


def known_length(loader: Any) -> int | None:
    """How many batches a loader has, or None where it does not say."""
    try:
        return len(loader)
    except TypeError:
        return None
