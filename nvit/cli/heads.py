"""A new head for the images of a command."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .. import adapters, parallel
from ..training.classes import class_names
from ..training.masks import mask_classes
from .flags import DataFlags


def with_new_head(
    model: nn.Module, task: str, flags: DataFlags, say: Callable[[str], None], *, asked: bool
) -> tuple[nn.Module, bool]:
    """A model, dense or compact, with a fresh head for the classes of its training images, and whether it has one now.

    For `segmentation` a head for pixels takes the classifier's place, also unasked where there is none yet; else it is
    a new classifier.

    Raises:
        ValueError: no images are named, they do not say their classes, or the model's head cannot be replaced.
    """
    pixels = adapters.of(model).task(model) == "segmentation"
    if not asked and (task != "segmentation" or pixels):
        return model, False
    if not flags.data:
        raise ValueError("a new head takes its classes from --data, which is missing")
    if task == "segmentation" or (pixels and task == "auto"):
        names = parallel.from_main(lambda: mask_classes(flags.data, flags.ignore_label))
        model = adapters.segmenter(model.host if pixels else model, names)
    elif task in ("auto", "classification"):
        names = parallel.from_main(lambda: class_names(flags.data, flags.class_map))
        adapters.of(model).new_head_(model, names)
    else:
        raise ValueError(f"--new-head makes heads for classes of images or pixels; task {task} has neither")
    say(f"new head of {len(names)} classes: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}")
    return model, True
