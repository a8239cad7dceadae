"""From flags to images, with a clear word where they do not fit the model."""

from __future__ import annotations

from torch import nn
from torch.utils.data import DataLoader

from .. import adapters, tasks
from ..tasks import Task
from ..training.images import DigitImages, Images, Labels
from ..training.masks import MaskImages
from ..training.targets import TargetImages
from .flags import DIGITS, DataFlags
from .progress import say

NO_DATA = "--data is missing: a folder of class folders, or a timm data set as torch/cifar10:FOLDER"


def open_images(
    model: nn.Module, flags: DataFlags, *, task: str = "auto", witness: str = "order"
) -> Images | TargetImages | MaskImages | DigitImages:
    """The images of a command.

    Args:
        task: what the model is for, by its name.
        witness: on what the model is asked about its labels, see `training.images.Labels`.

    Raises:
        ValueError: nothing is named, or it does not fit the model.
    """
    if _uses_digits(model, flags.data or flags.eval_data):
        return DigitImages()
    if not (flags.data or flags.eval_data):
        raise ValueError(NO_DATA)
    whose = tasks.of(task, model)
    if whose.name == "segmentation":
        return _mask_images(model, flags)
    if not whose.class_numbers:
        return _target_images(model, flags, whose)
    if flags.targets or flags.eval_targets:
        raise ValueError(f"--targets goes with --task multilabel or regression; the task is {whose.name}")
    labels = Labels(class_map=flags.class_map, order=flags.class_order, accept=flags.accept_labels, witness=witness)
    return Images(
        model,
        flags.data,
        flags.eval_data,
        labels=labels,
        resize=flags.resize,
        skip_broken=flags.skip_broken,
        workers=flags.processes(),
        say=say,
    )


def _mask_images(model: nn.Module, flags: DataFlags) -> MaskImages:
    for name in ("targets", "eval_targets", "class_map", "accept_labels", "skip_broken"):
        if getattr(flags, name):
            raise ValueError(f"--{name.replace('_', '-')} is not for --task segmentation, whose labels are images")
    return MaskImages(
        model=model,
        where=flags.data or flags.eval_data,
        evaluated=flags.eval_data,
        ignored=flags.ignore_label,
        workers=flags.processes(),
        say=say,
    )


def _target_images(model: nn.Module, flags: DataFlags, task: Task) -> TargetImages:
    for name in ("class_map", "accept_labels"):
        if getattr(flags, name):
            raise ValueError(f"--{name.replace('_', '-')} is about class folders; task {task.name} has none")
    if not task.reads_labels and (flags.targets or flags.eval_targets):
        raise ValueError(f"--targets are labels, and task {task.name} reads none")
    return TargetImages(
        model=model,
        where=flags.data or flags.eval_data,
        evaluated=flags.eval_data,
        targets=flags.targets,
        evaluated_targets=flags.eval_targets,
        labelled=task.reads_labels,
        resize=flags.resize,
        skip_broken=flags.skip_broken,
        workers=flags.processes(),
        say=say,
    )


def has_images(model: nn.Module, flags: DataFlags) -> bool:
    """Whether a command names images, or its model brings some."""
    return bool(flags.data or flags.eval_data) or _uses_digits(model, "")


def open_evaluation_data(model: nn.Module, flags: DataFlags, batch_size: int, task: str = "auto") -> DataLoader | None:
    """The images that a command evaluates, which trains on none; None where no data is named."""
    if not has_images(model, flags):
        return None
    return open_images(model, flags, task=task).evaluation(batch_size, flags.eval_images, own=True)


def _uses_digits(model: nn.Module, data: str) -> bool:
    bundled = adapters.preprocess(model)["input_size"] == (1, 8, 8)
    if data == DIGITS and not bundled:
        raise ValueError("the bundled digits are 1 × 8 × 8 and fit the bundled model alone; give --data for this one")
    return data == DIGITS or (bundled and not data)
