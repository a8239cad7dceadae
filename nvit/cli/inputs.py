"""From flags to models, images and latency tables, with a clear word where they do not fit together."""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import load_checkpoint
from torch import Tensor, nn

from .. import adapters, parallel
from ..adapters import hf_folder
from ..config import TrainingConfig
from ..latency.clock import current_setting
from ..latency.table import LatencyTable, default_cache
from ..layers.functional import use_kernels
from ..structure import snapshot
from ..training.data import Digits, TrainingData, evaluation_loader, open_images, subset, transform
from ..training.distill import frozen, renormalisation
from ..utils.progress import Progress, silent
from .commands import DIGITS, DataFlags, LatencyFlags, ModelFlags


def pick_device(name: str) -> torch.device:
    """The device of a flag; the GPU if there is one when empty, each rank's own under torchrun."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: this machine has no usable CUDA GPU; use --device cpu")
    return parallel.own_device(device)


def open_model(name: str, flags: ModelFlags, *, scratch: bool = False) -> nn.Module:
    """A prepared model on its device: a snapshot folder, a folder that transformers wrote, a timm name, or the bundled
    digits model.

    Raises:
        ValueError: unknown name, damaged snapshot or checkpoint, unsupported family.
    """
    device = pick_device(flags.device)
    use_kernels(flags.kernels)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    if name == DIGITS:
        name = str(snapshot.BUNDLED)
    if snapshot.is_snapshot(name):
        model = snapshot.fresh(snapshot.load_spec(name)) if scratch else snapshot.load(name)
        size = adapters.preprocess(model)["input_size"]
        if flags.img_size not in (0, size[-1]):
            raise ValueError(f"{name} takes images of {size[-2]} × {size[-1]}; leave out --img-size {flags.img_size}")
    elif Path(name).is_dir():
        model = _hf_model(name, flags, scratch)
    elif not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"model {name!r} is neither a snapshot folder nor a timm model{hint}")
    else:
        model = _timm_model(name, flags, scratch)
    adapters.find(model).prepare(model)
    return model.to(device)


def _hf_model(folder: str, flags: ModelFlags, scratch: bool) -> nn.Module:
    if not hf_folder.is_folder(folder):
        raise ValueError(
            f"{folder} is a folder but not a snapshot (no spec.json) nor a Hugging Face model (no config.json)"
        )
    for flag, value in (("--checkpoint", flags.checkpoint), ("--num-classes", flags.num_classes)):
        if value:
            raise ValueError(f"{flag} goes with a timm name; {folder} is a Hugging Face model with its own")
    return hf_folder.open_folder(folder, weights=flags.pretrained and not scratch)


def _timm_model(name: str, flags: ModelFlags, scratch: bool) -> nn.Module:
    asked = {key: value for key in ("num_classes", "img_size") if (value := getattr(flags, key))}
    pretrained = flags.pretrained and not flags.checkpoint and not scratch
    try:
        model = timm.create_model(name, pretrained=pretrained, **asked)
    except Exception as e:
        if not pretrained:
            raise
        raise ValueError(f"{name}: pretrained weights cannot be had ({e}); give --checkpoint or --no-pretrained") from e
    if flags.checkpoint and not scratch:
        if not Path(flags.checkpoint).is_file():
            raise ValueError(f"checkpoint {flags.checkpoint} does not exist")
        # timm's own filter brings position embeddings to another image size.
        resampled = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        filter_fn = resampled if flags.img_size else None
        try:
            load_checkpoint(model, flags.checkpoint, use_ema=False, weights_only=True, filter_fn=filter_fn)
        except (RuntimeError, KeyError, OSError, SafetensorError, EOFError, ValueError) as e:
            first = str(e).strip().splitlines()[0]
            raise ValueError(f"checkpoint {flags.checkpoint} does not fit {name}: {first}") from None
    return model


def open_training_data(
    model: nn.Module, flags: DataFlags, config: TrainingConfig, augment: bool = True
) -> TrainingData:
    """The shuffled training batches of a command."""
    if _uses_digits(model, flags.data):
        dataset = Digits(training=True, augment=augment)
    else:
        if not flags.data:
            raise ValueError("--data is missing: a folder of class folders, or a timm data set as torch/cifar10:FOLDER")
        recipe = config if augment else None
        pipeline = transform(adapters.preprocess(model), resize=flags.resize, training=recipe)
        classes = adapters.classes(model)
        dataset = open_images(flags.data, "train", class_map=flags.class_map, classes=classes, transform=pipeline)
    return TrainingData(dataset, config.batch_size, config.seed, flags.workers, config.repeats if augment else 1)


def open_evaluation_data(model: nn.Module, flags: DataFlags, batch_size: int):
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


def open_table(model: nn.Module, flags: LatencyFlags, bundle_sizes, progress: Progress = silent) -> LatencyTable:
    """The latency table of a command: from a file, analytic, or measured here and cached.

    Raises:
        ValueError: a table of another model or setting.
    """
    if flags.table == "analytic":
        return LatencyTable.analytic(model, bundle_sizes)
    if flags.table:
        table = LatencyTable.load(flags.table)
        if table.setting is not None:
            p = next(model.parameters())
            tokens = adapters.find(model).tokens(model)
            table.check(current_setting(p.device, p.dtype, flags.latency_batch, tokens), model_widths(model))
        return table
    p = next(model.parameters())
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


def model_widths(model: nn.Module):
    return snapshot.spec_of(model).blocks


def open_cnn_teacher(config: TrainingConfig, model: nn.Module):
    """The CNN teacher of a recipe, and the change of image normalisation towards it."""
    if not config.cnn_teacher:
        return None, None
    device = next(model.parameters()).device
    try:
        teacher = timm.create_model(config.cnn_teacher, pretrained=True).to(device)
    except Exception as e:
        raise ValueError(f"CNN teacher {config.cnn_teacher!r} cannot be had: {e}") from None
    theirs, mine = teacher.num_classes, adapters.classes(model)
    if theirs != mine:
        raise ValueError(f"CNN teacher {config.cnn_teacher!r} has {theirs} classes, the model {mine}")
    images = adapters.preprocess(model), resolve_data_config(model=teacher)
    return frozen(teacher), renormalisation(*images, device)
