"""The architectures of Hugging Face transformers that can be pruned, and the library itself.

transformers is imported where a model of it is made, never to look at another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .base import host_class

OLDEST = (5, 18)
"""The first transformers whose four families name their projections alike."""

HALF, IMAGENET_MEAN, IMAGENET_STD = (0.5,) * 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic", "crop_pct": 224 / 256}


@dataclass(frozen=True)
class Host:
    """What an architecture calls its pieces, and how its checkpoints' images are prepared where nothing else is said.

    Attributes:
        layers: of the base model.
        norms, scales: of a block, before and after its attention and MLP; no scales where there is no LayerScale.
        classifiers: of the class token and of the distillation token.
        reads: vectors of the stream that a classifier reads side by side: the class token, the mean of the patches.
        any_size: it interpolates its positions for images of any size.
        images: as timm's data config names it.
    """

    layers: str
    norms: tuple[str, str]
    images: Mapping[str, Any]
    scales: tuple[str, ...] = ()
    classifiers: tuple[str, ...] = ("classifier",)
    reads: int = 1
    any_size: bool = False


_VIT = Host(
    "layers",
    ("layernorm_before", "layernorm_after"),
    {"mean": HALF, "std": HALF, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"},
)
_DEIT = replace(_VIT, images=IMAGENET | {"crop_mode": "squash"})
_DINO = Host(
    "encoder.layer",
    ("norm1", "norm2"),
    IMAGENET | {"crop_mode": "center"},
    scales=("layer_scale1", "layer_scale2"),
    reads=2,
    any_size=True,
)
ARCHITECTURES: dict[str, Host] = {
    "ViTForImageClassification": _VIT,
    "DeiTForImageClassification": _DEIT,
    "DeiTForImageClassificationWithTeacher": replace(_DEIT, classifiers=("cls_classifier", "distillation_classifier")),
    "Dinov2ForImageClassification": _DINO,
    "Dinov2WithRegistersForImageClassification": _DINO,
}


def host_of(model: nn.Module) -> Host:
    """What a model's architecture calls its pieces."""
    return ARCHITECTURES[host_class(model).__name__]


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a size in a config, which may be a square's side."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def too_old(transformers: ModuleType) -> str | None:
    """Why this version of transformers will not do, or None."""
    found = transformers.__version__
    if tuple(int(n) for n in found.split(".")[:2]) < OLDEST:
        return f"transformers {found} is too old; pip install 'transformers>={OLDEST[0]}.{OLDEST[1]}'"
    return None


def library() -> ModuleType:
    """transformers itself, imported now.

    Raises:
        ModuleNotFoundError: it is not installed.
        ValueError: it is too old.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Hugging Face models need transformers: pip install 'nvit[hf]'") from None
    if reason := too_old(transformers):
        raise ValueError(reason)
    return transformers


def dense(architecture: str, config: Mapping[str, Any], device: str) -> nn.Module:
    """An unprepared model of a config, freshly initialised where `device` has memory.

    Raises:
        ValueError: it does not build one.
    """
    cls = getattr(library(), architecture)
    try:
        with torch.device(device):
            return cls(cls.config_class.from_dict(dict(config)))
    except Exception as e:  # its validation has exception classes of its own
        raise ValueError(f"its config does not build a {architecture}: {' '.join(str(e).split())}") from None
