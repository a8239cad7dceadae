"""Tiny models of every supported kind, with weights that leave nothing at zero or one, and random masks for them."""

from __future__ import annotations

from functools import partial

import torch
from hypothesis import strategies as st
from timm.layers import GluMlp, QuickGELU, SwiGLU, SwiGLUPacked
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers.attention import Attention as TimmAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from nvit import adapters
from nvit.structure.masks import apply_


class WideHeads:
    """timm's attention with heads of another width than embed_dim // num_heads; its blocks ask for a class."""

    def __new__(cls, *args, **kwargs):
        return TimmAttention(*args, attn_head_dim=20, **kwargs)


TINY = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "num_classes": 7,
    "weight_init": "skip",
}

TINY_HOSTS: dict[str, dict] = {
    "plain": {},
    "deit_distilled": {"cls": VisionTransformerDistilled},
    "deit3": {"init_values": 1e-2, "no_embed_class": True},
    "dinov2": {"init_values": 1e-2, "patch_size": 14, "img_size": (28, 42), "act_layer": "gelu_tanh"},
    "registers": {"reg_tokens": 3, "no_embed_class": True, "init_values": 1e-2},
    "registers_embedded": {"reg_tokens": 2},
    "average_pooling": {"global_pool": "avg", "class_token": False},
    "average_pooling_class_token": {"global_pool": "avg", "fc_norm": True},
    "average_pooling_prefix": {"global_pool": "avg", "reg_tokens": 1, "pool_include_prefix": True},
    "average_pooling_norm_first": {"global_pool": "avg", "fc_norm": False, "class_token": False},
    "max_pooling": {"global_pool": "max", "class_token": False},
    "no_embed_class": {"no_embed_class": True},
    "no_position": {"pos_embed": "none"},
    "clip": {"pre_norm": True, "act_layer": QuickGELU},
    "odd_sizes": {"patch_size": (4, 14), "img_size": (12, 28), "embed_dim": 30, "num_heads": 2, "mlp_ratio": 1.9},
    "dynamic_size": {"dynamic_img_size": True},
    "no_qkv_bias": {"qkv_bias": False},
    "qk_norm": {"qk_norm": True},
    "qk_norm_no_bias": {"qk_norm": True, "qkv_bias": False, "norm_layer": partial(TimmLayerNorm, bias=False)},
    "no_proj_bias": {"proj_bias": False},
    "wide_heads": {"attn_layer": WideHeads},
    "one_head": {"num_heads": 1, "embed_dim": 16},
    "swiglu_packed": {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "init_values": 1e-2},
    "swiglu": {"mlp_layer": SwiGLU, "act_layer": "silu", "proj_bias": False},
    "glu": {"mlp_layer": GluMlp, "act_layer": "silu", "mlp_ratio": 1.6, "embed_dim": 30, "num_heads": 2},
    "relu": {"act_layer": "relu", "norm_layer": partial(TimmLayerNorm, eps=1e-3)},
    "three_blocks": {"depth": 3, "embed_dim": 32, "num_heads": 4},
    "one_channel": {"in_chans": 1},
    "no_classifier": {"num_classes": 0},
}
"""Constructor arguments by kind of model, over `TINY`; `cls` where it is not VisionTransformer."""


@torch.no_grad()
def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of a trained model's magnitude: no zero bias, no unit norm, no vanishing token."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p)
        if name.endswith(("_token", "_tokens", "pos_embed", "position_embeddings")):
            p.copy_(noise * 0.5)
        elif p.dim() > 1:
            p.copy_(noise / p[0].numel() ** 0.5)
        elif name.endswith("bias"):
            p.copy_(noise * 0.2)
        else:
            p.copy_(1 + noise * 0.3)
    return model


def make(host: str, dtype: torch.dtype = torch.float32, seed: int = 0, **more) -> nn.Module:
    """A timm model as a user would give it, not prepared."""
    kwargs = TINY | TINY_HOSTS[host] | more
    cls = kwargs.pop("cls", VisionTransformer)
    return randomise_(cls(**kwargs), seed).to(dtype).eval()


def images(model: nn.Module, batch: int = 3, seed: int = 1) -> torch.Tensor:
    """Standard normal images of the model's size and dtype."""
    embed, g = model.patch_embed, torch.Generator().manual_seed(seed)
    shape = (batch, embed.proj.in_channels, *embed.img_size)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(embed.proj.weight.dtype)


def labels(model: nn.Module, batch: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(model.num_classes, (batch,), generator=torch.Generator().manual_seed(seed))


def prepared(host: str, dtype: torch.dtype = torch.float32, **more):
    """A prepared model and its groups."""
    model = adapters.find(m := make(host, dtype, **more)).prepare(m)
    return model, adapters.find(model).groups(model)


@st.composite
def masks_for(draw, groups, least_channels: int = 1):
    """Masks that keep any non-empty subset of every group (a bit for each unit), `least_channels` of the stream."""
    found = {}
    for g in groups:
        bits = st.integers(1, 2**g.size - 1)
        if g.kind == "emb" and least_channels > 1:
            bits = bits.filter(lambda n: n.bit_count() >= least_channels)
        keep = draw(bits, label=g.name)
        found[g.name] = torch.tensor([bool(keep >> i & 1) for i in range(g.size)])
    return found


def random_masks(groups, keep: float = 0.6, seed: int = 3) -> dict[str, torch.Tensor]:
    """Masks that keep about `keep` of every group, at least one unit."""
    g = torch.Generator().manual_seed(seed)
    counts = {group.name: max(1, round(keep * group.size)) for group in groups}
    return {group.name: torch.randperm(group.size, generator=g) < counts[group.name] for group in groups}


def masked(host: str, keep: float = 0.6, dtype: torch.dtype = torch.float32, **more):
    """A masked model, its groups and its masks."""
    model, groups = prepared(host, dtype, **more)
    masks = random_masks(groups, keep)
    apply_(model, groups, masks)
    return model, groups, masks
