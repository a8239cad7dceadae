"""What every model of timm has: classes that are known, a data config, a constructor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from ..spec import ViTSpec
from .base import Adapter


class TimmAdapter(Adapter):
    """The adapter of a family of timm.

    Attributes:
        architectures: its classes by name.
    """

    architectures: ClassVar[Mapping[str, type[nn.Module]]]

    def knows(self, model: nn.Module) -> bool:
        return type(model) in self.architectures.values()

    def hosts(self) -> tuple[type, ...]:
        return tuple(self.architectures.values())

    def settings(self, model: nn.Module) -> dict[str, Any]:
        """Of the images and the classifier."""
        embed, head = model.patch_embed, model.get_classifier()
        head = head[0] if isinstance(head, tuple) else head
        classes = head.out_features if isinstance(head, nn.Linear) else model.num_classes
        return {
            "img_size": list(embed.img_size) if embed.img_size else None,
            "in_chans": embed.proj.in_channels,
            "num_classes": 0 if isinstance(head, nn.Identity) else classes,
            "global_pool": model.global_pool,
        }

    def new_head_(self, model: nn.Module, names: Sequence[str]) -> None:
        """Weights are drawn as timm draws a ViT's, N(0, 0.02²); both of a distilled model's heads are new."""
        classifiers = model.get_classifier()
        inputs = [getattr(c, "in_features", None) for c in _all(classifiers)]
        if None in inputs:
            raise ValueError(
                f"{type(model).__name__} has no linear classifier to replace (num_classes 0); give --num-classes"
            )
        model.reset_classifier(len(names))
        for name, module in list(model.named_modules()):
            if any(module is c for c in _all(model.get_classifier())):
                # Behind attention pooling the head is as wide as the dense model, whatever the stream is.
                fresh = nn.Linear(inputs.pop(0), len(names)).to(module.weight)
                nn.init.trunc_normal_(fresh.weight, std=0.02)
                nn.init.zeros_(fresh.bias)
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, fresh.train(model.training))
        model.class_names = tuple(names)
        self.prepare(model)

    def extent(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        depths = config.get("depths") or [config.get("depth", 0)]
        tokens = _area(config.get("img_size") or 0) // max(1, _area(config.get("patch_size", 1)))
        return sum(depths), tokens, config.get("embed_dim", 0)

    def name(self, model: nn.Module) -> str:
        """timm's name of the pretrained model, or the class."""
        return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__

    def preprocess(self, model: nn.Module) -> dict[str, Any]:
        """timm's data config, at the model's own input size."""
        data, embed = resolve_data_config(model=model), model.patch_embed
        if embed.img_size:
            # A model built by hand or with img_size= has another size than its pretrained config says.
            data["input_size"] = (embed.proj.in_channels, *embed.img_size)
        return data

    def token_stream(self, model: nn.Module, images: Tensor) -> Tensor:
        return model.forward_features(images).flatten(1, -2)

    def leading(self, model: nn.Module) -> int:
        return getattr(model, "num_prefix_tokens", 0) if getattr(model, "cls_token", None) is not None else 0

    def construct(self, spec: ViTSpec, config: Mapping[str, Any], device: str) -> nn.Module:
        """timm's model of `spec` from its constructor's arguments, not prepared.

        Raises:
            ValueError: an unknown architecture, or arguments that it does not take.
        """
        if spec.architecture not in self.architectures:
            names = ", ".join(self.architectures)
            raise ValueError(f"architecture {spec.architecture!r} is unknown; expected one of {names}")
        try:
            with torch.device(device):
                model = self.architectures[spec.architecture](**config)
        except Exception as e:  # as many classes as there are arguments
            raise ValueError(f"its config does not build a {spec.architecture}: {e}") from None
        data = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.preprocess.items()}
        model.pretrained_cfg = data | {"architecture": spec.name, "num_classes": model.num_classes}
        model.default_cfg = model.pretrained_cfg
        return model


def _all(classifiers: nn.Module | tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    return classifiers if isinstance(classifiers, tuple) else (classifiers,)


def _area(size: int | Sequence[int]) -> int:
    """Of a rectangle given by its sides, or of a square by one."""
    return size**2 if isinstance(size, int) else math.prod(size)
