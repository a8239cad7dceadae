"""Hugging Face's image classifiers and towers, tiny; none where transformers is missing."""

from __future__ import annotations

import importlib.util
from functools import partial

from torch import nn

from tests.hosts import randomise_

HERE = importlib.util.find_spec("transformers") is not None

TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 7,
}
VIT, DINO = TINY | {"intermediate_size": 96}, TINY | {"image_size": 28, "patch_size": 14, "mlp_ratio": 2}

MODELS: dict[str, tuple[str, dict]] = {
    "vit": ("ViTForImageClassification", VIT),
    "vit_oblong": ("ViTForImageClassification", VIT | {"image_size": [12, 28], "patch_size": [4, 14]}),
    "vit_tanh_no_bias": ("ViTForImageClassification", VIT | {"hidden_act": "gelu_pytorch_tanh", "qkv_bias": False}),
    "vit_one_channel": ("ViTForImageClassification", VIT | {"num_channels": 1, "layer_norm_eps": 1e-3}),
    "deit": ("DeiTForImageClassification", VIT | {"hidden_act": "relu"}),
    "deit_teacher": ("DeiTForImageClassificationWithTeacher", VIT),
    "dinov2": ("Dinov2ForImageClassification", DINO),
    "dinov2_swiglu": ("Dinov2ForImageClassification", DINO | {"use_swiglu_ffn": True, "use_mask_token": False}),
    "dinov2_interpolated": ("Dinov2ForImageClassification", DINO),
    "dinov2_registers": ("Dinov2WithRegistersForImageClassification", DINO | {"num_register_tokens": 3}),
}
"""Class, and arguments of its config, by kind of model."""

PROJECTED = VIT | {"projection_dim": 24, "hidden_act": "quick_gelu"}
TOWERS: dict[str, tuple[str, dict]] = {
    "vit_tower": ("ViTModel", VIT),
    "vit_tower_no_pooler": ("ViTModel", VIT | {"add_pooling_layer": False}),
    "dinov2_tower": ("Dinov2Model", DINO),
    "dinov2_registers_tower": ("Dinov2WithRegistersModel", DINO | {"num_register_tokens": 3}),
    "dinov3_tower": ("DINOv3ViTModel", VIT | {"num_register_tokens": 2, "image_size": 24}),
    "dinov3_gated_tower": ("DINOv3ViTModel", VIT | {"num_register_tokens": 2, "use_gated_mlp": True, "image_size": 24}),
    "clip_tower": ("CLIPVisionModel", PROJECTED),
    "clip_projected_tower": ("CLIPVisionModelWithProjection", PROJECTED),
    "siglip_tower": ("SiglipVisionModel", VIT | {"hidden_act": "gelu_pytorch_tanh"}),
    "siglip_headless_tower": ("SiglipVisionModel", VIT | {"vision_use_head": False}),
}
"""The same of towers without a classifier."""


def make(name: str, **more) -> nn.Module:
    """A model as a user would give it, not prepared."""
    import transformers

    architecture, config = (MODELS | TOWERS)[name]
    cls, config = getattr(transformers, architecture), config | more
    own = {"add_pooling_layer": config.pop("add_pooling_layer")} if "add_pooling_layer" in config else {}
    model = randomise_(cls(cls.config_class(**config), **own)).eval()
    if name == "dinov2_interpolated":
        model.preprocess = {"input_size": (3, 42, 28)}
    return model


HOSTS = {f"hf_{name}": partial(make, name) for name in MODELS} if HERE else {}
TOWER_HOSTS = {f"hf_{name}": partial(make, name) for name in TOWERS} if HERE else {}
