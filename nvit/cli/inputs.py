"""From flags to images and latency tables, with a clear word where they do not fit the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import adapters
from ..config import TrainingConfig
from ..latency.clock import current_setting
from ..latency.table import LatencyTable, default_cache
from ..structure import snapshot
from ..training.data import Digits, TrainingData, evaluation_loader, open_images, subset, transform
from ..utils.progress import Progress, silent
from .flags import DIGITS, DataFlags, LatencyFlags

NO_DATA = "--data is missing: a folder of class folders, or a timm data set as torch/cifar10:FOLDER"


def open_training_data(
    model: nn.Module, flags: DataFlags, config: TrainingConfig, augment: bool = True
) -> TrainingData:
    """The shuffled training batches of a command, as large, ordered and augmented as its config says."""
    if _uses_digits(model, flags.data):
        dataset = Digits(training=True, augment=augment)
    else:
        if not flags.data:
            raise ValueError(NO_DATA)
        recipe = config if augment else None
        pipeline = transform(adapters.preprocess(model), resize=flags.resize, training=recipe)
        classes = adapters.classes(model)
        dataset = open_images(flags.data, "train", class_map=flags.class_map, classes=classes, transform=pipeline)
    return TrainingData(dataset, config.batch_size, config.seed, flags.workers, config.repeats if augment else 1)


def open_evaluation_data(model: nn.Module, flags: DataFlags, batch_size: int) -> DataLoader | None:
    """The evaluation batches of a command; None where no data is named."""
    where = flags.eval_data or flags.data
    if _uses_digits(model, where):
        dataset = Digits(training=False)
    elif not where:
        return None
    else:
        pipeline = transform(adapters.preprocess(model), resize=flags.resize)
        classes = adapters.classes(model)
        dataset = open_images(where, "validation", class_map=flags.class_map, classes=classes, transform=pipeline)
    return evaluation_loader(subset(dataset, flags.eval_images), batch_size, flags.workers)


def _uses_digits(model: nn.Module, data: str) -> bool:
    bundled = adapters.preprocess(model)["input_size"] == (1, 8, 8)
    if data == DIGITS and not bundled:
        raise ValueError("the bundled digits are 1 × 8 × 8 and fit the bundled model alone; give --data for this one")
    return data == DIGITS or (bundled and not data)


def sample_images(model: nn.Module, batch_size: int) -> Tensor:
    """Random images of the model's input size, on its device and in its dtype."""
    p = next(model.parameters())
    size = adapters.preprocess(model)["input_size"]
    return torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(0)).to(p.device, p.dtype)


def open_table(
    model: nn.Module, flags: LatencyFlags, bundle_sizes: Mapping[str, int], progress: Progress = silent
) -> LatencyTable:
    """The latency table of a command: counted, read, or measured on the model's device.

    Raises:
        ValueError: a table of another model or setting.
    """
    p = next(model.parameters())
    if flags.table == "analytic":
        return LatencyTable.analytic(model, bundle_sizes)
    if flags.table:
        table = LatencyTable.load(flags.table)
        if table.setting is not None:
            tokens = adapters.find(model).tokens(model)
            here = current_setting(p.device, p.dtype, flags.latency_batch, tokens)
            table.check(here, snapshot.spec_of(model).blocks)
        return table
    progress(0, 1, f"measuring latency, about {flags.latency_seconds:.0f} s")
    table = LatencyTable.measure(
        model,
        flags.latency_batch,
        p.device,
        p.dtype,
        bundle_sizes=bundle_sizes,
        seconds=flags.latency_seconds,
        cache=default_cache(),
    )
    progress(1, 1, "measuring latency")
    return table
