"""ReViT (arXiv:2110.04869, section 5.4, Table 6): new transformers of the widths that pruning tends to.

Two sets of widths go by that name. `revit_widths` is the paper's *rule*, for any width and depth. `PUBLISHED` holds the
*published* widths of the two models it trained, which are not the rule's: rounding happens before the middle blocks are
doubled, and the first and the last block have 10 heads and twice the query/key width. The registered transformers are
the published ones. The registered Swin follows the rule, stage by stage. No pretrained weights exist for any of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from timm.models import register_model
from torch import nn

from .adapters.timm_config import mlp_ratio
from .spec import BlockWidths, ViTSpec
from .structure.snapshot import fresh
from .utils.files import write_atomically

V_DIM = 64


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Widths of every block as multiples of the stream's, wider by one factor in a middle part of the blocks: what the
    paper's Table 6 says, with numbers of one's own. `nvit analyze rule` fits one to pruned models.

    Attributes:
        heads, qk_dim, mlp: per channel of the stream, in blocks outside of the middle.
        v_dim: of every head, everywhere.
        factor: of heads, qk_dim and mlp in the middle.
        middle: its first block and the one behind its last, of `of` blocks; other depths take the same share, rounded
            outwards.
        multiples: what widths are rounded to, the nearest one, at least one.

    >>> nvit.zoo.Rule(heads=1 / 64, qk_dim=1 / 8, v_dim=32, mlp=2, factor=1.5, middle=(1, 3), of=4).widths(128, 2)[0]
    BlockWidths(emb=128, heads=3, qk_dim=24, v_dim=32, mlp=384)
    """

    heads: float
    qk_dim: float
    v_dim: int
    mlp: float
    factor: float
    middle: tuple[int, int]
    of: int
    multiples: Mapping[str, int] = field(default_factory=lambda: {"heads": 1, "qk_dim": 8, "mlp": 16})

    def widths(self, emb: int, depth: int = 12) -> tuple[BlockWidths, ...]:
        """Raises ValueError for a width or depth below 1."""
        if emb < 1 or depth < 1:
            raise ValueError(f"emb {emb} and depth {depth} make no transformer; both have to be at least 1")
        first, end = self.middle[0] * depth // self.of, -(-self.middle[1] * depth // self.of)
        blocks = []
        for i in range(depth):
            e = emb * (self.factor if first <= i < end else 1)
            fitted = {k: _to_multiple(getattr(self, k) * e, of) for k, of in self.multiples.items()}
            blocks.append(BlockWidths(emb=emb, v_dim=self.v_dim, **fitted))
        return tuple(blocks)

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `load` reads."""
        write_atomically(Path(path), (json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Rule:
        """Raises ValueError where the file is no rule."""
        try:
            found = json.loads(Path(path).read_text())
            return cls(**found | {"middle": tuple(found["middle"])})
        except (ValueError, TypeError, KeyError) as e:
            raise ValueError(f"{path} is not a rule of widths as `nvit analyze rule` writes one ({e})") from None


def _to_multiple(value: float, of: int) -> int:
    """The nearest positive multiple, halves upwards."""
    return max(1, int(value / of + 0.5)) * of


REVIT = Rule(
    heads=1 / 100,
    qk_dim=1 / 20,
    v_dim=V_DIM,
    mlp=3,
    factor=2,
    middle=(1, 3),
    of=4,
    multiples={"heads": 2, "qk_dim": 8, "mlp": 1},
)
"""The paper's Table 6: ε = 2 in the middle half (blocks 4 to 9 of 12) and 1 elsewhere, heads = ε·emb/100, qk_dim =
ε·emb/20, v_dim = 64, mlp = 3·ε·emb."""


def revit_widths(emb: int, depth: int = 12) -> tuple[BlockWidths, ...]:
    """The ReViT rule: twice the heads, query/key dims and hidden units in the middle half of the blocks.

    Heads to the nearest even number, qk_dim to the nearest multiple of 8. For a Swin model, once per stage.

    Raises:
        ValueError: a width or depth below 1.

    >>> [block.mlp for block in nvit.zoo.revit_widths(200, depth=4)]
    [600, 1200, 1200, 600]
    """
    return REVIT.widths(emb, depth)


def _blocks(emb: int, heads: Sequence[int], qk_dim: Sequence[int], mlp: Sequence[int]) -> tuple[BlockWidths, ...]:
    return tuple(BlockWidths(emb, h, q, V_DIM, m) for h, q, m in zip(heads, qk_dim, mlp, strict=True))


PUBLISHED: dict[str, tuple[BlockWidths, ...]] = {
    "small": _blocks(
        384,
        heads=(10, 4, 4, *(8,) * 6, 4, 4, 10),
        qk_dim=(32, 16, 16, *(32,) * 6, 16, 16, 32),
        mlp=(*(1152,) * 3, *(2304,) * 6, *(1152,) * 3),
    ),
    "tiny": _blocks(
        176,
        heads=(10, 2, 2, *(4,) * 6, 2, 2, 10),
        qk_dim=(16, 8, 8, *(16,) * 6, 8, 8, 16),
        mlp=(*(528,) * 3, *(1056,) * 6, *(528,) * 3),
    ),
}
"""Widths of the two published models, block by block."""

IMAGENET = {
    "input_size": [3, 224, 224],
    "interpolation": "bicubic",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def revit(widths: Sequence[BlockWidths], *, distilled: bool = False, name: str = "revit", **config: Any) -> nn.Module:
    """A newly initialised transformer of these widths, ready to train, save and prune further.

    It is cut out of a dense timm model as wide as its widest block, so that attention keeps that model's logit scale,
    1/√64, in every block whatever its query/key width: the scale of a pruned DeiT, and the one a snapshot restores.

    Args:
        widths: of each block; `emb` the same in all.
        distilled: with a distillation token and its classifier.
        config: further arguments of timm's VisionTransformer, as `num_classes`, `img_size` or `drop_path_rate`.

    Raises:
        ValueError: blocks whose `emb` differ, or an argument that timm does not take.

    >>> widths = nvit.zoo.revit_widths(100, depth=2)
    >>> model = nvit.zoo.revit(widths, num_classes=5, img_size=32)
    >>> model(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 5])
    """
    if len({b.emb for b in widths}) != 1:
        raise ValueError(f"blocks have emb {[b.emb for b in widths]}; one residual stream has one width")
    emb = widths[0].emb
    dense = {
        "patch_size": 16,
        "embed_dim": emb,
        "depth": len(widths),
        "num_heads": max(b.heads for b in widths),
        "head_dim": max(V_DIM, *(max(b.qk_dim, b.v_dim) for b in widths)),
        "mlp_ratio": mlp_ratio(emb, max(b.mlp for b in widths)),
        "act_layer": "gelu",
    }
    architecture = "VisionTransformerDistilled" if distilled else "VisionTransformer"
    return fresh(ViTSpec("timm_vit", architecture, dense | config, tuple(widths), IMAGENET, name))


def revit_swin_widths(emb: int = 88, depths: Sequence[int] = (2, 2, 6, 2)) -> tuple[tuple[BlockWidths, ...], ...]:
    """The ReViT rule for each stage of a Swin model whose first is `emb` wide and each further twice the one before.

    A stage of two blocks is all middle, so that both are doubled. With Swin-T's depths, 88 comes near to its MACs.

    >>> [len(stage) for stage in nvit.zoo.revit_swin_widths()]
    [2, 2, 6, 2]
    """
    return tuple(revit_widths(emb * 2**stage, depth) for stage, depth in enumerate(depths))


def revit_swin(stages: Sequence[Sequence[BlockWidths]], *, name: str = "revit_swin", **config: Any) -> nn.Module:
    """A newly initialised Swin model of these widths, ready to train, save and prune further.

    It is cut out of a dense timm model in the same way as `revit`, with that model's logit scale in every block.

    Args:
        stages: widths of the blocks of each stage; `emb` the same in all of a stage.
        config: further arguments of timm's SwinTransformer, as `window_size`, `num_classes` or `img_size`.

    Raises:
        ValueError: a stage without blocks or with blocks whose `emb` differ, or an argument that timm does not take.

    >>> stages = nvit.zoo.revit_swin_widths(32, depths=(1, 1))
    >>> model = nvit.zoo.revit_swin(stages, num_classes=5, img_size=56)
    >>> model(torch.zeros(1, 3, 56, 56)).shape
    torch.Size([1, 5])
    """
    for place, blocks in enumerate(stages):
        if len({b.emb for b in blocks}) != 1:
            raise ValueError(f"stage {place} has blocks of emb {[b.emb for b in blocks]}; it has to have one width")
    first = max(math.ceil(blocks[0].emb / 2**place) for place, blocks in enumerate(stages))
    dense = {
        "patch_size": 4,
        "window_size": 7,
        "embed_dim": first,
        "depths": [len(blocks) for blocks in stages],
        "num_heads": [max(b.heads for b in blocks) for blocks in stages],
        "head_dim": [max(V_DIM, *(max(b.qk_dim, b.v_dim) for b in blocks)) for blocks in stages],
        "mlp_ratio": [mlp_ratio(first * 2**i, max(b.mlp for b in blocks)) for i, blocks in enumerate(stages)],
    }
    blocks = tuple(block for stage in stages for block in stage)
    return fresh(ViTSpec("timm_swin", "SwinTransformer", dense | config, blocks, IMAGENET, name))


def _timm_arguments(name: str, pretrained: bool, config: dict[str, Any]) -> dict[str, Any]:
    """What timm's factory passes on to a model's constructor.

    Raises:
        ValueError: pretrained weights are asked for.
    """
    if pretrained:
        raise ValueError(f"{name} has no pretrained weights; train it with `nvit finetune {name} --scratch`")
    return {k: v for k, v in config.items() if not k.startswith("pretrained_") and k != "cache_dir"}


def _published(size: str, distilled: bool, pretrained: bool, config: dict[str, Any]) -> nn.Module:
    name = f"revit_{size}_{'distilled_' if distilled else ''}patch16_224"
    passed = _timm_arguments(name, pretrained, config)
    return revit(PUBLISHED[size], distilled=distilled, name=name, **passed)


@register_model
def revit_small_patch16_224(pretrained: bool = False, **config: Any) -> nn.Module:
    """ReViT-S: published widths at emb 384.

    >>> model = timm.create_model("revit_small_patch16_224", img_size=32)
    >>> model.embed_dim
    384
    """
    return _published("small", False, pretrained, config)


@register_model
def revit_tiny_patch16_224(pretrained: bool = False, **config: Any) -> nn.Module:
    """ReViT-T: published widths at emb 176.

    >>> model = timm.create_model("revit_tiny_patch16_224", img_size=32)
    >>> model.embed_dim
    176
    """
    return _published("tiny", False, pretrained, config)


@register_model
def revit_small_distilled_patch16_224(pretrained: bool = False, **config: Any) -> nn.Module:
    """ReViT-S with a distillation token: 23.12 M parameters, 4.705 GMAC.

    >>> model = timm.create_model("revit_small_distilled_patch16_224", img_size=32)
    >>> model.dist_token.shape
    torch.Size([1, 1, 384])
    """
    return _published("small", True, pretrained, config)


@register_model
def revit_tiny_distilled_patch16_224(pretrained: bool = False, **config: Any) -> nn.Module:
    """ReViT-T with a distillation token: 5.34 M parameters, 1.135 GMAC.

    >>> model = timm.create_model("revit_tiny_distilled_patch16_224", img_size=32)
    >>> model.dist_token.shape
    torch.Size([1, 1, 176])
    """
    return _published("tiny", True, pretrained, config)


@register_model
def revit_swin_patch4_window7_224(pretrained: bool = False, **config: Any) -> nn.Module:
    """The rule at Swin-T's depths and windows: 30.60 M parameters, 4.589 GMAC, where Swin-T has 28.29 and 4.491.

    >>> model = timm.create_model("revit_swin_patch4_window7_224", num_classes=5)
    >>> model.num_classes
    5
    """
    name = "revit_swin_patch4_window7_224"
    return revit_swin(revit_swin_widths(), name=name, **_timm_arguments(name, pretrained, config))
