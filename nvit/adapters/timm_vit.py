"""timm's VisionTransformer and VisionTransformerDistilled: plain, DeiT, LayerScale, registers, pre-norm, norms inside
attention and MLP, SwiGLU, RMSNorm, any pooling of tokens and pooling by a latent query."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.layers import AttentionPoolLatent, PatchEmbed
from timm.layers import LayerScale as TimmLayerScale
from timm.layers.attention import Attention as TimmAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..modules import Attention, GatedMlp, LayerScale, Layout, Prunable, StreamEntry
from ..spec import BUNDLE_SIZES, KINDS, BlockWidths, Group, Part, ViTSpec
from .declare import Width, block_axes, block_widths, collect, embedding_slices, norm, resize_layers, with_axes
from .pooling import LatentPool, latent_pool, pool_macs, pool_refusal
from .timm_layers import (
    ACTIVATIONS,
    MLPS,
    NORMS,
    classifier,
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

ARCHITECTURES = {cls.__name__: cls for cls in (VisionTransformer, VisionTransformerDistilled)}
EMB = {"emb": "emb"}


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
    if type(model.patch_embed) is not PatchEmbed:
        return f"patch embedding type {type(model.patch_embed).__name__}"
    if not is_norm_or_none(model.patch_embed.norm):
        return f"norm type {type(model.patch_embed.norm).__name__} in the patch embedding"
    if not (isinstance(model.norm_pre, StreamEntry) or is_norm_or_none(model.norm_pre)):
        return f"norm type {type(model.norm_pre).__name__} before the blocks"
    if not (is_norm_or_none(model.norm) and is_norm_or_none(model.fc_norm)):
        return f"norm type {type(model.norm).__name__} after the blocks"
    if len(model.blocks) == 0:
        return "no blocks"
    return next((r for r in map(_block_refusal, model.blocks) if r), pool_refusal(model.attn_pool))


def _norm(host: nn.Module, **more: bool) -> nn.Module:
    return host if isinstance(host, nn.Identity) else norm(host, EMB, **more)


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
    model.patch_embed.norm = _norm(model.patch_embed.norm, embedding=True)
    entry = model.norm_pre
    model.norm_pre = _norm(entry, entry=True) if is_norm(entry) else with_axes(EMB, StreamEntry(), entry)
    for i, block in enumerate(model.blocks):
        block.norm1, block.norm2 = _norm(block.norm1), _norm(block.norm2)
        attention_axes, mlp_axes = block_axes(f"blocks.{i}")
        block.attn, block.mlp = _attention(block.attn, attention_axes), mlp(block.mlp, mlp_axes)
        for name in ("ls1", "ls2"):
            if isinstance(getattr(block, name), TimmLayerScale):
                scale = getattr(block, name)
                setattr(block, name, with_axes(EMB, LayerScale(scale.gamma), scale))
    normed = is_norm(model.norm) or is_norm(model.fc_norm)
    model.norm = _norm(model.norm)
    if isinstance(model.attn_pool, AttentionPoolLatent):
        model.attn_pool = latent_pool(model.attn_pool, EMB)  # norm and classifier behind it work in its own width
        return model
    model.fc_norm, model.head = _norm(model.fc_norm), classifier(model.head, EMB, reads_stream=not normed)
    if isinstance(model, VisionTransformerDistilled):
        model.head_dist = classifier(model.head_dist, EMB, reads_stream=not normed)
    return model


def groups(model: nn.Module, bundle_sizes: Mapping[str, int] = BUNDLE_SIZES) -> list[Group]:
    """Every prunable width of a prepared model: `emb`, then `heads`, `qk_dim`, `v_dim` and `mlp` block by block.

    The gate of a stream's unit sits on what every reader sees. A norm feeds exactly one reader (or the classifiers
    together), so the gate gradients of its weight and bias add up to the readers' columns at a fraction of the cost.
    """
    depth = len(model.blocks)
    widths = [Width("emb", "emb", tuple(range(depth)))]
    for i in range(depth):
        widths += block_widths(f"blocks.{i}", i)
    patches = {"patch_embed.proj.weight": 0, "patch_embed.proj.bias": 0}
    tokens = dict.fromkeys(("cls_token", "dist_token", "reg_token", "pos_embed"), 2)
    return collect(model, widths, {"emb": embedding_slices(model, tokens | patches, patches)}, bundle_sizes)


def _config(model: nn.Module) -> dict[str, Any]:
    """Constructor arguments that rebuild a timm model, read off the model, so that ones built by hand work as well."""
    block, embed = model.blocks[0], model.patch_embed
    last = next((m for m in (model.norm, model.fc_norm) if is_norm(m)), None)
    config = {
        "img_size": list(embed.img_size) if embed.img_size else None,
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
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
        "final_norm": last is not None,
        "fc_norm": is_norm(model.fc_norm),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "act_layer": name_in(ACTIVATIONS, block.mlp.act),
        "norm_layer": name_in(NORMS, block.norm1),
        "norm_eps": (last or block.norm1).eps,
        "mlp_layer": mlp_name(block.mlp),
    }
    if is_norm(embed.norm):
        config["embed_norm_layer"] = name_in(NORMS, embed.norm)
        config["embed_norm_eps"] = embed.norm.eps
    if getattr(block.norm1, "bias", None) is None and config["norm_layer"] == "layernorm":
        config["norm_bias"] = False
    if block.attn.head_dim != model.embed_dim // block.attn.num_heads:
        config["head_dim"] = block.attn.head_dim
    return config


def preprocess(model: nn.Module) -> dict[str, Any]:
    """How images are prepared for `model`, prepared or not: timm's data config, at the model's own input size."""
    data = resolve_data_config(model=model)
    if model.patch_embed.img_size:
        # A model built by hand or with img_size= has another size than its pretrained config says.
        data["input_size"] = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    return data


def spec(model: nn.Module, blocks: Sequence[BlockWidths]) -> ViTSpec:
    """The spec of a prepared model at these widths."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in preprocess(model).items()}
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
    return ViTSpec("timm_vit", type(model).__name__, model.dense_config, tuple(blocks), plain, name)


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
    if spec.architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {spec.architecture!r} is unknown; expected one of {', '.join(ARCHITECTURES)}")
    config = dict(spec.config)
    config["act_layer"] = known(config, "act_layer", ACTIVATIONS)
    config["mlp_layer"] = known(config, "mlp_layer", MLPS, "mlp")
    norm_args = {"eps": config.pop("norm_eps", 1e-6)} | ({} if config.pop("norm_bias", True) else {"bias": False})
    layer = partial(known(config, "norm_layer", NORMS, "layernorm"), **norm_args)
    if "embed_norm_layer" in config:
        eps = config.pop("embed_norm_eps")
        config["embed_norm_layer"] = partial(known(config, "embed_norm_layer", NORMS), eps=eps)
    if head_dim := config.pop("head_dim", None):
        config["attn_layer"] = _attention_of(head_dim)
    try:
        with torch.device(device):
            model = ARCHITECTURES[spec.architecture](**config, norm_layer=layer)
    except (TypeError, AssertionError) as e:
        raise ValueError(f"its config does not build a {spec.architecture}: {e}") from None
    data = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.preprocess.items()}
    model.pretrained_cfg = data | {"architecture": spec.name, "num_classes": model.num_classes}
    model.default_cfg = model.pretrained_cfg
    return prepare(model)


def resize(model: nn.Module, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> nn.Module:
    """Give a prepared model these parameters and the widths that `masks` leaves, in place."""
    resize_layers(model, params, masks)
    emb = int(masks["emb"].sum())
    model.embed_dim = model.num_features = emb
    if not isinstance(model.attn_pool, LatentPool):
        model.head_hidden_size = emb
    model.patch_embed.proj.out_channels = emb
    for info in model.feature_info:
        info["num_chs"] = emb
    return model


def logits(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """`(batch, classes)` from the class token and, of a distilled model, from the distillation token."""
    if not isinstance(model, VisionTransformerDistilled):
        return model(images), None
    x = model.forward_features(images)
    return model.head(model.head_drop(x[:, 0])), model.head_dist(model.head_drop(x[:, 1]))


def tokens(model: nn.Module) -> int:
    """Tokens in the residual stream at the model's own input size."""
    return model.patch_embed.num_patches + model.num_prefix_tokens


def parts(model: nn.Module) -> tuple[Part, ...]:
    """The attention and the MLP of every block, each with its norm and residual, and the rest of the model."""
    every = range(len(model.blocks))
    return (
        Part("attention", ("emb", "heads", "qk_dim", "v_dim"), tuple((i,) * 4 for i in every)),
        Part("mlp", ("emb", "mlp"), tuple((i, i) for i in every)),
        Part("rest", ("emb",), ((0,),)),
    )


def part_macs(model: nn.Module, part: Part) -> Callable[..., int]:
    """Multiply-accumulates an image of one piece of `part`, as a function of its widths."""
    length = tokens(model)
    if part.name == "attention":
        return lambda emb, heads, qk, v: length * heads * (emb * (2 * qk + v) + v * emb + length * (qk + v))
    if part.name == "mlp":
        matrices = 3 if isinstance(model.blocks[0].mlp, GatedMlp) else 2
        return lambda emb, hidden: length * matrices * emb * hidden
    conv = model.patch_embed.proj.weight[0].numel() * model.patch_embed.num_patches
    if isinstance(model.attn_pool, LatentPool):
        pooled = length if model.pool_include_prefix else model.patch_embed.num_patches
        per_channel, fixed = pool_macs(model.attn_pool, pooled)
        head = model.attn_pool.out_features * model.num_classes
        return lambda emb: (conv + per_channel) * emb + fixed + head
    classifiers = 2 if isinstance(model, VisionTransformerDistilled) else 1
    return lambda emb: (conv + classifiers * model.num_classes) * emb


def sample_spec(spec: ViTSpec, part: Part, widths: Sequence[int]) -> ViTSpec:
    """One block that has `widths` along the axes of `part`, and elsewhere the widest of the model."""
    widest = BlockWidths(**{kind: max(getattr(b, kind) for b in spec.blocks) for kind in KINDS})
    block = replace(widest, **dict(zip(part.kinds, widths, strict=True)))
    return replace(spec, config={**spec.config, "depth": 1}, blocks=(block,))


def piece(model: nn.Module, part: Part) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """`attention` or `mlp` of the first block with its norm and residual, stream to stream; or the `rest`, images to
    logits with no block in between, for which `model` loses its blocks."""
    block, stream = model.blocks[0], (tokens(model), model.embed_dim)
    if part.name == "attention":
        return lambda x: x + block.ls1(block.attn(block.norm1(x))), stream
    if part.name == "mlp":
        return lambda x: x + block.ls2(block.mlp(block.norm2(x))), stream
    model.blocks = nn.Sequential()
    return model, preprocess(model)["input_size"]
