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

POOLER = "add_pooling_layer"
"""ViTModel's own argument beside its config, kept with it."""

OLDEST = (5, 18)
"""The first transformers whose four families name their projections alike."""

HALF, IMAGENET_MEAN, IMAGENET_STD = (0.5,) * 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic", "crop_pct": 224 / 256}


@dataclass(frozen=True)
class Host:
    """What an architecture calls its pieces, and how its checkpoints' images are prepared where nothing else is said.

    Attributes:
        layers: of the base model.
        norms, scales: of a block, before and after its attention and MLP; no scales where there is no LayerScale.
        base: the base model inside the model; the model itself where empty.
        patches: the convolution over patches; where it lies in the base model, as the next two do.
        entry: what hands the tokens to the blocks: a dropout, a norm, or the embeddings.
        norm: the one behind the blocks.
        attention, proj: of a block, and the layer of it that writes the stream.
        prefix: tokens before the patches, without registers; the first is the class token.
        classifiers: of the class token and of the distillation token; none of a tower.
        readers: other linear layers that read what the last norm hands out, in the base model's names.
        projection: one of the whole model behind the pooled output.
        pool: the module that pools tokens by attention, in the base model.
        outputs: fields of a tower's output that hold its features, the first that is there.
        norm_pools: the last norm sees the class token alone.
        reads: vectors of the stream that a classifier reads side by side: the class token, the mean of the patches.
        any_size: it takes images of any size.
        images: as timm's data config names it.
    """

    layers: str
    norms: tuple[str, str]
    images: Mapping[str, Any]
    scales: tuple[str, ...] = ()
    base: str = ""
    patches: str = "embeddings.patch_embeddings.projection"
    entry: str = "embeddings.dropout"
    norm: str = "layernorm"
    attention: str = "attention"
    proj: str = "o_proj"
    prefix: int = 1
    classifiers: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    projection: str = ""
    pool: str = ""
    outputs: tuple[str, ...] = ("pooler_output", "last_hidden_state")
    norm_pools: bool = False
    reads: int = 1
    any_size: bool = False


_VIT = Host(
    "layers",
    ("layernorm_before", "layernorm_after"),
    {"mean": HALF, "std": HALF, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"},
    readers=("pooler.dense",),
)
_VIT_CLASSIFIER = replace(_VIT, base="vit", classifiers=("classifier",), readers=())
_DEIT = replace(_VIT_CLASSIFIER, base="deit", prefix=2, images=IMAGENET | {"crop_mode": "squash"})
_DINO = Host(
    "encoder.layer",
    ("norm1", "norm2"),
    IMAGENET | {"crop_mode": "center"},
    scales=("layer_scale1", "layer_scale2"),
    any_size=True,
)
_DINO3 = replace(
    _DINO,
    layers="model.layer",
    patches="embeddings.patch_embeddings",
    entry="embeddings",
    norm="norm",
    images=IMAGENET | {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"},
)
_CLIP = Host(
    "encoder.layers",
    ("layer_norm1", "layer_norm2"),
    {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"},
    patches="embeddings.patch_embedding",
    entry="pre_layrnorm",
    norm="post_layernorm",
    attention="self_attn",
    proj="out_proj",
    norm_pools=True,
)
_SIGLIP = replace(
    _CLIP,
    images={"mean": HALF, "std": HALF, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"},
    entry="embeddings",
    prefix=0,
    pool="head",
    norm_pools=False,
)


def _classifier(of: Host, base: str) -> Host:
    return replace(of, base=base, classifiers=("classifier",), reads=2)


ARCHITECTURES: dict[str, Host] = {
    "ViTForImageClassification": _VIT_CLASSIFIER,
    "DeiTForImageClassification": _DEIT,
    "DeiTForImageClassificationWithTeacher": replace(_DEIT, classifiers=("cls_classifier", "distillation_classifier")),
    "Dinov2ForImageClassification": _classifier(_DINO, "dinov2"),
    "Dinov2WithRegistersForImageClassification": _classifier(_DINO, "dinov2_with_registers"),
    "ViTModel": _VIT,
    "Dinov2Model": _DINO,
    "Dinov2WithRegistersModel": _DINO,
    "DINOv3ViTModel": _DINO3,
    "CLIPVisionModel": _CLIP,
    "CLIPVisionModelWithProjection": replace(
        _CLIP, base="vision_model", projection="visual_projection", outputs=("image_embeds",)
    ),
    "SiglipVisionModel": _SIGLIP,
}

REFUSED = {
    "Siglip2VisionModel": "it takes patches with a mask and their spatial shapes, not images; of a fixed size it is "
    "timm's vit_base_patch16_siglip_224.v2_webli and alike, which are supported",
}
"""Architectures that were looked at and do not fit, and what to do."""


def is_tower(model: nn.Module) -> bool:
    """Whether a model is one of transformers' towers without a classifier."""
    cls = host_class(model)
    host = ARCHITECTURES.get(cls.__name__)
    return host is not None and not host.classifiers and cls.__module__.startswith("transformers.models.")


def host_of(model: nn.Module) -> Host:
    """What a model's architecture calls its pieces."""
    return ARCHITECTURES[host_class(model).__name__]


def base_of(model: nn.Module) -> nn.Module:
    """What holds embeddings, blocks and the last norm."""
    return model.get_submodule(host_of(model).base)


def in_base(model: nn.Module, name: str) -> str:
    """The name in the model of what the base model calls `name`."""
    return ".".join(part for part in (host_of(model).base, name) if part)


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
    cls, config = getattr(library(), architecture), dict(config)
    more = {POOLER: config.pop(POOLER)} if POOLER in config else {}
    try:
        with torch.device(device):
            model = cls(cls.config_class.from_dict(config), **more)
    except Exception as e:  # its validation has exception classes of its own
        raise ValueError(f"its config does not build a {architecture}: {' '.join(str(e).split())}") from None
    fill_tables_(model)
    return model


def fill_tables_(model: nn.Module) -> None:
    """Give a model that was built on the meta device its tables, which are not saved, on the CPU."""
    for module in model.modules():
        for name, table in module.named_buffers(recurse=False):
            if table.is_meta and name == "position_ids":
                module.position_ids = torch.arange(table.shape[-1]).expand(table.shape)
            elif table.is_meta and name == "inv_freq":
                module.inv_freq = type(module)(module.config).inv_freq
