"""timm's data sets by name: torchvision's (`torch/cifar10:FOLDER`) and Hugging Face's (`hfds/NAME`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from timm.data import create_dataset
from torch.utils.data import Dataset

from ..utils.files import short
from .folders import MODES

STREAMS = ("hfids/", "tfds/", "wds/")
"""Prefixes of timm's data sets that are read as a stream."""


def timm_images(where: str, split: str, class_map: str, transform: Callable | None, channels: int) -> Dataset:
    """The images of a timm data set, read in the model's channels.

    Raises:
        ValueError: no such data set, one that is a stream, or a library that is not there; says what to do.
    """
    name, _, root = where.partition(":")
    if name.lower().startswith(STREAMS):
        raise ValueError(
            f"data {where!r} is a stream without an order or a length, which a reproducible run needs; write it out as "
            "FOLDER/<class>/<image>, or give a loader of your own in Python"
        )
    if not name.lower().startswith(("torch/", "hfds/")):
        raise ValueError(f"data {where!r}: no such folder, and not a timm data set name as torch/cifar10 or hfds/NAME")
    if name.lower().startswith("hfds/") and importlib.util.find_spec("datasets") is None:
        raise ValueError(f"data {where!r} is read by Hugging Face's datasets, which is missing: pip install datasets")
    if class_map and not Path(class_map).is_file():
        raise ValueError(f"class map {class_map} does not exist")
    how = {"input_img_mode": MODES.get(channels, "RGB")} if name.lower().startswith("hfds/") else {}
    try:
        dataset = create_dataset(name, root=root or ".", split=split, class_map=class_map or None, **how)
    except Exception as e:  # every data set's library has exceptions of its own
        raise ValueError(f"data {where!r}: no images to read for {split} ({short(e, 300)})") from None
    if len(dataset) == 0:
        raise ValueError(f"data {where!r}: no images found for {split}")
    dataset.transform = transform
    if hasattr(dataset, "_max_retries"):
        dataset._max_retries = 1  # timm would give the next image for one that cannot be read
    return dataset
