"""A model of any family whose tokens make a map, with SETR's naive head (arXiv:2012.15840): a class for every pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import BUNDLE_SIZES, BlockWidths, Group, Part, ViTSpec
from .base import Adapter, Logits, Piece
from .feature_maps import FeatureMaps

HIDDEN = 256
"""Channels between the head's two convolutions."""


class Segmenter(nn.Module):
    """Norm (the host's last), 1 × 1 convolution, BN, ReLU, 1 × 1 convolution, bilinear upsampling to the image.

    The first convolution is a linear layer over tokens; its inputs are the host's residual stream, and leave with it.

    Args:
        host: prepared, without a classifier.
        maps: the adapter of its family.
        classes: that pixels are told apart by.
        hidden: channels between both convolutions.
    """

    def __init__(self, host: nn.Module, maps: FeatureMaps, classes: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.host, self.maps, self.num_classes, self.hidden = host, maps, classes, hidden
        project = nn.Linear(maps.map_shape(host)[2], hidden, bias=False)
        nn.init.kaiming_normal_(project.weight, nonlinearity="relu")
        self.project = maps.map_reader(host, project)
        self.norm = nn.BatchNorm2d(hidden)
        self.classify = nn.Conv2d(hidden, classes, 1)
        nn.init.trunc_normal_(self.classify.weight, std=0.02)
        nn.init.zeros_(self.classify.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(batch, classes, height, width)` of images `(batch, channels, height, width)`."""
        return self.decode(self.maps.feature_map(self.host, images), images.shape[-2:])

    def decode(self, features: Tensor, size: Sequence[int]) -> Tensor:
        """Logits at `size` of features `(batch, rows, columns, channels)`."""
        x = F.relu(self.norm(self.project(features).movedim(-1, 1)))
        return F.interpolate(self.classify(x), tuple(size), mode="bilinear", align_corners=False)


class Segmenters(Adapter):
    """The adapter of a segmenter: its host's, whose groups reach into the head's first convolution.

    Args:
        families: adapters by name, those of hosts.
    """

    family = "segmenter"

    def __init__(self, families: Mapping[str, Adapter]) -> None:
        self.families = families

    def _host(self, model: nn.Module) -> Adapter:
        return self.families[model.maps.family]

    def knows(self, model: nn.Module) -> bool:
        return type(model) is Segmenter

    def refusal(self, model: nn.Module) -> str | None:
        return self._host(model).refusal(model.host)

    def prepare(self, model: nn.Module) -> nn.Module:
        model.dense_config = {}  # its host has one
        return model

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return self._host(model).blocks(model.host)

    def groups(self, model: nn.Module, bundle_sizes: Mapping[str, int] = BUNDLE_SIZES) -> list[Group]:
        """The host's, under its names for them; its last stream's units own columns of the first convolution too."""
        read: dict[str, list] = {}
        for axis, s in model.project.slices():
            read.setdefault(model.project.axes[axis], []).append(replace(s, name=f"project.{s.name}"))
        return [
            replace(g, slices=(*(replace(s, name=f"host.{s.name}") for s in g.slices), *read.get(g.name, ())))
            for g in self._host(model).groups(model.host, bundle_sizes)
        ]

    def spec(self, model: nn.Module, blocks: Sequence[BlockWidths]) -> ViTSpec:
        host = self._host(model).spec(model.host, blocks)
        config = self.settings(model) | {"host": {k: asdict(host)[k] for k in ("family", "architecture", "config")}}
        labels = tuple(getattr(model, "class_names", ()))
        return ViTSpec(
            self.family, "Segmenter", config, host.blocks, host.preprocess, host.name, merges=host.merges, labels=labels
        )

    def settings(self, model: nn.Module) -> dict[str, Any]:
        return {"classes": model.num_classes, "hidden": model.hidden}

    def extent(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return self._named(config).extent(config["host"]["config"])

    def _named(self, config: Mapping[str, Any]) -> Adapter:
        host = config.get("host")
        family = self.families.get(host.get("family")) if isinstance(host, Mapping) else None
        if not isinstance(family, FeatureMaps):
            known = ", ".join(name for name, a in self.families.items() if isinstance(a, FeatureMaps))
            raise ValueError(f"a segmenter's host is {str(host)[:60]!r}; expected one of the families {known}")
        return family

    def name(self, model: nn.Module) -> str:
        return self._host(model).name(model.host)

    def build(self, spec: ViTSpec, device: str = "meta") -> nn.Module:
        maps = self._named(spec.config)
        host = maps.build(_host_spec(spec), device)
        with torch.device(device):
            try:
                model = Segmenter(host, maps, spec.config["classes"], spec.config["hidden"])
            except (KeyError, TypeError, RuntimeError) as e:
                raise ValueError(f"its config does not build a Segmenter: {e}") from None
        if device == "meta":  # buffers are no weights: they have values
            model.norm.to_empty(device="cpu").reset_running_stats()
            model.norm._parameters = {name: nn.Parameter(p.to("meta")) for name, p in model.norm.named_parameters()}
        return self.prepare(model)

    def resize(self, model: nn.Module, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> nn.Module:
        mine = {name: t for name, t in params.items() if not name.startswith("host.")}
        theirs = {name.removeprefix("host."): t for name, t in params.items() if name.startswith("host.")}
        self._host(model).resize(model.host, theirs, masks)
        modules = dict(model.named_modules())
        for name, tensor in mine.items():
            owner, _, leaf = name.rpartition(".")
            old = getattr(modules[owner], leaf)
            trained = isinstance(old, nn.Parameter)
            setattr(modules[owner], leaf, nn.Parameter(tensor.detach(), old.requires_grad) if trained else tensor)
        model.project.out_features, model.project.in_features = model.project.weight.shape
        model.project.resize_({axis: masks[group] for axis, group in model.project.axes.items()})
        model.project.unwatch_()
        device = model.project.weight.device
        if device.type != "meta":
            for name, buffer in model.norm.named_buffers():
                setattr(model.norm, name, buffer.to(device))
        return model

    def logits(self, model: nn.Module, images: Tensor) -> Logits:
        return Logits(model(images))

    def output_norm(self, model: nn.Module) -> str:
        raise ValueError("keep_output is about features of towers; a segmenter hands out classes of pixels")

    def token_stream(self, model: nn.Module, images: Tensor) -> Tensor:
        return self._host(model).token_stream(model.host, images)

    def leading(self, model: nn.Module) -> int:
        return self._host(model).leading(model.host)

    def preprocess(self, model: nn.Module) -> dict[str, Any]:
        return self._host(model).preprocess(model.host)

    def set_image_size_(self, model: nn.Module, size: tuple[int, int]) -> None:
        self._host(model).set_image_size_(model.host, size)

    def label_names(self, model: nn.Module) -> dict[str, int]:
        return {name: i for i, name in enumerate(getattr(model, "class_names", ()))}

    def task(self, model: nn.Module) -> str | None:
        return "segmentation"

    def merge_refusal(self, model: nn.Module) -> str | None:
        return self._host(model).merge_refusal(model.host)

    def prefix(self, model: nn.Module) -> int:
        return self._host(model).prefix(model.host)

    def merges(self, model: nn.Module) -> tuple[int, ...]:
        return self._host(model).merges(model.host)

    def merge_(self, model: nn.Module, merges: Sequence[int]) -> None:
        self._host(model).merge_(model.host, merges)

    def tokens(self, model: nn.Module) -> int:
        return self._host(model).tokens(model.host)

    def parts(self, model: nn.Module) -> tuple[Part, ...]:
        return self._host(model).parts(model.host)

    def part_macs(self, model: nn.Module, part: Part) -> Callable[..., int]:
        inside = self._host(model).part_macs(model.host, part)
        if not _holds_head(part):
            return inside
        rows, columns, _ = model.maps.map_shape(model.host)
        return lambda emb: inside(emb) + rows * columns * model.hidden * (emb + model.num_classes)

    def sample_spec(self, spec: ViTSpec, part: Part, widths: Sequence[int]) -> ViTSpec:
        host = self._named(spec.config).sample_spec(_host_spec(spec), part, widths)
        config = {**spec.config, "host": {**spec.config["host"], "config": host.config}}
        return replace(spec, config=config, blocks=host.blocks, kept=host.kept, merges=host.merges)

    def piece(self, model: nn.Module, part: Part) -> Piece:
        run, shape = self._host(model).piece(model.host, part)
        size = self.preprocess(model)["input_size"]
        if part.name == "rest":
            return model, size
        if part.name == "head":
            return lambda x: model.decode(model.host.norm(x), size[-2:]), shape
        return run, shape


def segmenter(model: nn.Module, family: Adapter, names: Sequence[str], hidden: int = HIDDEN) -> Segmenter:
    """A model of a supported family, dense or compact, with a head for pixels in place of its classifier.

    Args:
        model: prepared; it becomes the host.
        family: its adapter.
        names: of the classes, in the order of their numbers.

    Raises:
        ValueError: its tokens make no map.
    """
    if not isinstance(family, FeatureMaps):
        raise ValueError(
            f"{type(model).__name__}: family {family.family} hands out no map of features for a segmentation head; "
            "take a timm ViT, DeiT, Swin, EVA or BEiT"
        )
    family.headless_(model)
    made = Segmenter(model, family, len(names), hidden).to(next(model.parameters()).device)
    made.class_names = tuple(names)
    made.dense_config = {}
    return made.train(model.training)


def _host_spec(spec: ViTSpec) -> ViTSpec:
    host = spec.config["host"]
    try:
        architecture, config = host["architecture"], dict(host["config"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"a segmenter's host is {str(host)[:60]!r}; expected family, architecture and config"
        ) from None
    return ViTSpec(
        host["family"],
        architecture,
        config,
        spec.blocks,
        spec.preprocess,
        spec.name,
        kept=spec.kept,
        merges=spec.merges,
    )


def _holds_head(part: Part) -> bool:
    """Whether what follows the blocks is measured in it."""
    return part.name in ("rest", "head")
