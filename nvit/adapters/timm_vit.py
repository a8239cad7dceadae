"""timm's VisionTransformer and VisionTransformerDistilled: plain, DeiT, LayerScale, registers, pre-norm, norms inside
attention and MLP, SwiGLU, RMSNorm, any pooling of tokens and pooling by a latent query."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from timm.layers import LayerScale as TimmLayerScale
from timm.layers.attention import Attention as TimmAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..layers import Attention, LayerScale, Layout, Prunable, StreamEntry
from ..spec import BUNDLE_SIZES, BlockWidths, Group, Part, ViTSpec
from . import timm_plain
from .base import Logits
from .declare import block_axes, with_axes
from .timm_layers import (
    ACTIVATIONS,
    MLPS,
    NORMS,
    inner_norm,
    is_norm,
    is_norm_or_none,
    known,
    mlp,
    mlp_hidden,
    mlp_name,
    mlp_ratio,
    mlp_refusal,
    name_in,
)
from .timm_plain import EMB, embedding_config, norm_config, norm_layer, prepare_output, stream_norm
from .timm_plain import parts as parts
from .timm_plain import preprocess as preprocess
from .timm_plain import resize as resize
from .timm_plain import sample_spec as sample_spec
from .timm_plain import tokens as tokens

ARCHITECTURES = {cls.__name__: cls for cls in (VisionTransformer, VisionTransformerDistilled)}


def _block_refusal(block: nn.Module) -> str | None:
    if type(block) is not Block:
        return f"block type {type(block).__name__}; only the pre-norm Block is known"
    attn = block.attn
    if not isinstance(attn, Attention):
        if type(attn) is not TimmAttention:
            return f"attention type {type(attn).__name__}"
        inner = next((m for m in (attn.q_norm, attn.k_norm, attn.norm) if not is_norm_or_none(m)), None)
        if inner is not None:
            return f"norm type {type(inner).__name__} in attention"
        if attn.gate is not None:
            return "gated attention output"
    if not (is_norm(block.norm1) and is_norm(block.norm2)):
        return f"norm type {type(block.norm1).__name__}"
    return mlp_refusal(block.mlp)


def knows(model: nn.Module) -> bool:
    """Whether `model` is of these classes; a subclass may compute something else."""
    return type(model) in ARCHITECTURES.values()


def refusal(model: nn.Module) -> str | None:
    """Why a model of this family is not supported, or None."""
    return timm_plain.refusal(model, _block_refusal)


def _attention(host: TimmAttention, axes: Mapping[str, str]) -> Prunable:
    dims = Layout.of("qk_dim", host.head_dim)
    layer = Attention(
        host,
        heads=host.num_heads,
        qk_dim=host.head_dim,
        v_dim=host.head_dim,
        scale=host.scale,
        q_norm=inner_norm(host.q_norm, dims, scored=True),
        k_norm=inner_norm(host.k_norm, dims),
        norm=inner_norm(host.norm, Layout(("heads", "v_dim"), (host.num_heads, host.head_dim))),
        attn_drop=host.attn_drop.p,
        proj_drop=host.proj_drop.p,
    )
    return with_axes(axes, layer, host)


def prepare(model: nn.Module) -> nn.Module:
    """Swap timm's layers for prunable ones, in place. Outputs, parameters and their names stay as they are."""
    if hasattr(model, "dense_config"):
        return model
    model.dense_config = _config(model)
    model.patch_embed.norm = stream_norm(model.patch_embed.norm, embedding=True)
    entry = model.norm_pre
    model.norm_pre = stream_norm(entry, entry=True) if is_norm(entry) else with_axes(EMB, StreamEntry(), entry)
    for i, block in enumerate(model.blocks):
        block.norm1, block.norm2 = stream_norm(block.norm1), stream_norm(block.norm2)
        attention_axes, mlp_axes = block_axes(f"blocks.{i}")
        block.attn, block.mlp = _attention(block.attn, attention_axes), mlp(block.mlp, mlp_axes)
        for name in ("ls1", "ls2"):
            if isinstance(getattr(block, name), TimmLayerScale):
                scale = getattr(block, name)
                setattr(block, name, with_axes(EMB, LayerScale(scale.gamma), scale))
    prepare_output(model, ("head", "head_dist") if isinstance(model, VisionTransformerDistilled) else ("head",))
    return model


def groups(model: nn.Module, bundle_sizes: Mapping[str, int] = BUNDLE_SIZES) -> list[Group]:
    """Every prunable width of a prepared model, see `timm_plain.groups`."""
    return timm_plain.groups(model, bundle_sizes)


def _config(model: nn.Module) -> dict[str, Any]:
    """Constructor arguments that rebuild a timm model, read off the model, so that ones built by hand work as well."""
    block, embed = model.blocks[0], model.patch_embed
    config = embedding_config(model) | {
        "mlp_ratio": mlp_ratio(model.embed_dim, mlp_hidden(block.mlp)),
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": is_norm(block.attn.q_norm),
        "scale_attn_norm": is_norm(block.attn.norm),
        "scale_mlp_norm": is_norm(block.mlp.norm),
        "proj_bias": block.attn.proj.bias is not None,
        "init_values": None if isinstance(block.ls1, nn.Identity) else 1.0,
        "class_token": model.has_class_token,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": is_norm(model.norm_pre),
        "final_norm": is_norm(model.norm) or is_norm(model.fc_norm),
        "fc_norm": is_norm(model.fc_norm),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "act_layer": name_in(ACTIVATIONS, block.mlp.act),
        "mlp_layer": mlp_name(block.mlp),
    }
    if is_norm(embed.norm):
        config["embed_norm_layer"] = name_in(NORMS, embed.norm)
        config["embed_norm_eps"] = embed.norm.eps
    if block.attn.head_dim != model.embed_dim // block.attn.num_heads:
        config["head_dim"] = block.attn.head_dim
    return config | norm_config(model)


def spec(model: nn.Module, blocks: Sequence[BlockWidths]) -> ViTSpec:
    """The spec of a prepared model at these widths."""
    return timm_plain.spec("timm_vit", model, blocks)


def _attention_of(head_dim: int) -> type:
    """timm's attention with a head width of its own, as the class that timm's blocks ask for."""
    return type(
        "Attention", (), {"__new__": lambda cls, *args, **more: TimmAttention(*args, attn_head_dim=head_dim, **more)}
    )


def build(spec: ViTSpec, device: str = "meta") -> nn.Module:
    """The prepared dense model of `spec`: on the meta device its structure alone, elsewhere freshly initialised.

    Raises:
        ValueError: an architecture or constructor argument this version does not know.
    """
    config = dict(spec.config)
    config["act_layer"] = known(config, "act_layer", ACTIVATIONS)
    config["mlp_layer"] = known(config, "mlp_layer", MLPS, "mlp")
    config["norm_layer"] = norm_layer(config)
    if "embed_norm_layer" in config:
        eps = config.pop("embed_norm_eps")
        config["embed_norm_layer"] = partial(known(config, "embed_norm_layer", NORMS), eps=eps)
    if head_dim := config.pop("head_dim", None):
        config["attn_layer"] = _attention_of(head_dim)
    return prepare(timm_plain.build(spec, ARCHITECTURES, config, device))


def logits(model: nn.Module, images: Tensor) -> Logits:
    """`(batch, classes)` from the class token and, of a distilled model, from the distillation token."""
    if not isinstance(model, VisionTransformerDistilled):
        return Logits(model(images))
    x = model.forward_features(images)
    return Logits(model.head(model.head_drop(x[:, 0])), model.head_dist(model.head_drop(x[:, 1])))


def part_macs(model: nn.Module, part: Part) -> Callable[..., int]:
    """Multiply-accumulates an image of one piece of `part`, as a function of its widths."""
    pooled = tokens(model) if model.pool_include_prefix else model.patch_embed.num_patches
    classifiers = 2 if isinstance(model, VisionTransformerDistilled) else 1
    return timm_plain.part_macs(model, part, pooled=pooled, classifiers=classifiers)


def piece(model: nn.Module, part: Part) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """A part of a one-block model as a function, see `timm_plain.piece`."""
    block = model.blocks[0]
    return timm_plain.piece(
        model,
        part,
        attention=lambda x: x + block.ls1(block.attn(block.norm1(x))),
        mlp=lambda x: x + block.ls2(block.mlp(block.norm2(x))),
    )
