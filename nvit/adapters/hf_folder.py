"""Folders that transformers' `save_pretrained` writes: a model, and beside it the image processor's own file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..spec import NewerFormat, ViTSpec
from ..utils.files import short
from .hf_config import spec_in
from .hf_hosts import ARCHITECTURES, dense, library

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers, which image processors use."""


def of_processor(processor: Mapping[str, Any], channels: int = 3) -> dict[str, Any]:
    """timm's data config from what an image processor of transformers saves (`processor.to_dict()`)."""
    found: dict[str, Any] = {}
    for theirs, mine in (("image_mean", "mean"), ("image_std", "std")):
        if processor.get(theirs):
            found[mine] = tuple(processor[theirs])
    if processor.get("resample") in RESAMPLE:
        found["interpolation"] = RESAMPLE[processor["resample"]]
    resized = processor.get("size") or {}
    if isinstance(resized, int):
        resized = {"shortest_edge": resized}
    shortest = resized.get("shortest_edge") or min(resized.get("height", 0), resized.get("width", 0))
    height, width = resized.get("height", shortest), resized.get("width", shortest)
    if shortest:
        found |= {"crop_pct": 1.0, "crop_mode": "center" if "shortest_edge" in resized else "squash"}
    if processor.get("do_center_crop") and (crop := processor.get("crop_size")):
        height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        found["crop_pct"] = min(1.0, min(height, width) / shortest) if shortest else 1.0
    return found | ({"input_size": (channels, height, width)} if height else {})


def to_processor(images: Mapping[str, Any]) -> dict[str, Any]:
    """What an image processor of transformers reads from `PROCESSOR`, from timm's data config: what `of_processor`
    takes back.

    Raises:
        ValueError: it cannot be said there.
    """
    numbers = {name: number for number, name in RESAMPLE.items()}
    mode, fraction = images.get("crop_mode", "center"), images.get("crop_pct", 1.0)
    if images.get("interpolation") not in numbers or mode not in ("center", "squash"):
        raise ValueError(
            f"images are resized by {images.get('interpolation')!r} and cropped by {mode!r}, for which image "
            "processors have no word; give a processor of your own"
        )
    sides = [round(side / fraction) for side in images["input_size"][1:]]
    height, width = images["input_size"][1:]
    return {
        "image_processor_type": "BitImageProcessor",  # the plain one: it resizes, crops and normalises as it is told
        "do_convert_rgb": len(images["mean"]) == 3,
        "do_resize": True,
        "size": {"shortest_edge": min(sides)} if mode == "center" else {"height": sides[0], "width": sides[1]},
        "resample": numbers[images["interpolation"]],
        "do_center_crop": mode == "center" or fraction < 1,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(images["mean"]),
        "image_std": list(images["std"]),
    }


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Without transformers' progress bar and loading report."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is damaged: {e}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(found).__name__}, expected an object")
    return found


def is_folder(path: str | Path) -> bool:
    """Whether `save_pretrained` may have written this folder."""
    return (Path(path) / CONFIG).is_file()


def pruned_spec(path: str | Path) -> ViTSpec | None:
    """The spec of the pruned model in a folder that its `save_pretrained` wrote; None in any other.

    Raises:
        ValueError: damaged, or of a later format.
    """
    file = Path(path) / CONFIG
    if not file.is_file():
        return None
    config = _read(file)
    try:
        spec = spec_in(config)
    except NewerFormat as e:
        raise ValueError(f"{path} {e}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"{file} is damaged: {short(e)}") from None
    if spec is None or not (Path(path) / PROCESSOR).is_file():
        return spec
    images = of_processor(_read(Path(path) / PROCESSOR), spec.config.get("num_channels", 3))
    return replace(spec, preprocess={**spec.preprocess, **images})


def open_folder(path: str | Path, *, weights: bool = True) -> nn.Module:
    """The model that `save_pretrained` wrote to a folder, fp32 and not prepared, with the preprocessing of the image
    processor saved beside it, if one was. Nothing is downloaded and nothing unpickled.

    Args:
        weights: False for newly initialised ones.

    Raises:
        ValueError: a class this adapter does not know, damaged files, or weights that do not fit the config.
        ModuleNotFoundError: transformers is not installed.
    """
    path = Path(path)
    config = _read(path / CONFIG)
    named = config.get("architectures") or [f"a {config.get('model_type', 'config')} without architectures"]
    architecture = named[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path} holds {architecture}, which is not supported; expected {', '.join(ARCHITECTURES)}")
    transformers = library()
    model = _load(transformers, architecture, path) if weights else dense(architecture, config, "cpu")
    model.config.name_or_path = path.resolve().name
    if (path / PROCESSOR).is_file():
        model.preprocess = of_processor(_read(path / PROCESSOR), model.config.num_channels)
    return model


def _load(transformers: ModuleType, architecture: str, path: Path) -> nn.Module:
    options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
    reports = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # it is said below, in one line
    try:
        with _quiet(transformers):
            model, report = getattr(transformers, architecture).from_pretrained(path, **options, **reports)
    except Exception as e:  # as many classes as there are ways to fail
        raise ValueError(f"{path} does not load as a {architecture}: {' '.join(str(e).split())}") from None
    if odd := sorted(report["mismatched_keys"]):
        name, found, expected = odd[0]
        raise ValueError(
            f"{path}: {name} is {tuple(found)}, but {tuple(expected)} by {CONFIG}, which has one width for all blocks. "
            "Save a pruned model with nvit.hf.save_pretrained(model, folder)"
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{path}: its weights lack {', '.join(missing[:3])}; save a model that is trained to classify")
    return model
