"""What timm's plain transformers share: a patch embedding, one residual stream through all blocks, norms, a pooling and
classifiers behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.layers import AttentionPoolLatent, PatchEmbed
from torch import Tensor, nn

from ..layers import GatedMlp, StreamEntry
from ..spec import BlockWidths, Group, Part, ViTSpec
from . import plain
from .declare import Width, block_widths, collect, embedding_slices, norm, resize_layers
from .pooling import LatentPool, latent_pool, pool_macs, pool_refusal
from .timm_layers import NORMS, classifier, is_norm, is_norm_or_none, known, name_in

EMB = {"emb": "emb"}


def refusal(model: nn.Module, block_refusal: Callable[[nn.Module], str | None]) -> str | None:
    """Why a plain transformer is not supported, or None; its blocks are judged by `block_refusal`."""
    if type(model.patch_embed) is not PatchEmbed:
        return f"patch embedding type {type(model.patch_embed).__name__}"
    if not is_norm_or_none(model.patch_embed.norm):
        return f"norm type {type(model.patch_embed.norm).__name__} in the patch embedding"
    entry = getattr(model, "norm_pre", None)
    if not (isinstance(entry, StreamEntry) or is_norm_or_none(entry)):
        return f"norm type {type(entry).__name__} before the blocks"
    for last in (model.norm, model.fc_norm):
        if not is_norm_or_none(last):
            return f"norm type {type(last).__name__} after the blocks"
    if len(model.blocks) == 0:
        return "no blocks"
    return next((r for r in map(block_refusal, model.blocks) if r), pool_refusal(getattr(model, "attn_pool", None)))


def stream_norm(host: nn.Module, **more: bool) -> nn.Module:
    """The prunable form of a norm over the stream, see `declare.norm`; an identity stays."""
    return host if isinstance(host, nn.Identity) else norm(host, EMB, **more)


def prepare_output(model: nn.Module, heads: Sequence[str] = ("head",)) -> None:
    """Swap what follows the blocks for prunable layers: norms, pooling, the classifiers named `heads`."""
    normed = is_norm(model.norm) or is_norm(model.fc_norm)
    model.norm = stream_norm(model.norm)
    if isinstance(getattr(model, "attn_pool", None), AttentionPoolLatent):
        model.attn_pool = latent_pool(model.attn_pool, EMB)  # norm and classifier behind it work in its own width
        return
    model.fc_norm = stream_norm(model.fc_norm)
    for name in heads:
        setattr(model, name, classifier(getattr(model, name), EMB, reads_stream=not normed))


def groups(model: nn.Module, bundle_sizes: Mapping[str, int]) -> list[Group]:
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


def embedding_config(model: nn.Module) -> dict[str, Any]:
    """Constructor arguments of the images' and the stream's size."""
    embed = model.patch_embed
    return {
        "img_size": list(embed.img_size) if embed.img_size else None,
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
    }


def norm_config(model: nn.Module) -> dict[str, Any]:
    """Which norm the model is made with, as `norm_layer` reads it."""
    like = next((m for m in (model.norm, model.fc_norm) if is_norm(m)), model.blocks[0].norm1)
    config = {"norm_layer": name_in(NORMS, model.blocks[0].norm1), "norm_eps": like.eps}
    if getattr(like, "bias", None) is None and config["norm_layer"] == "layernorm":
        config["norm_bias"] = False
    return config


def norm_layer(config: dict[str, Any]) -> Callable[..., nn.Module]:
    """The norm's constructor from what `norm_config` wrote, which is taken out of the config.

    Raises:
        ValueError: a norm this version does not know.
    """
    more = {"eps": config.pop("norm_eps", 1e-6)} | ({} if config.pop("norm_bias", True) else {"bias": False})
    return partial(known(config, "norm_layer", NORMS, "layernorm"), **more)


def preprocess(model: nn.Module) -> dict[str, Any]:
    """How images are prepared for `model`, prepared or not: timm's data config, at the model's own input size."""
    data = resolve_data_config(model=model)
    if model.patch_embed.img_size:
        # A model built by hand or with img_size= has another size than its pretrained config says.
        data["input_size"] = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    return data


def spec(family: str, model: nn.Module, blocks: Sequence[BlockWidths]) -> ViTSpec:
    """The spec of a prepared model at these widths."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in preprocess(model).items()}
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
    return ViTSpec(family, type(model).__name__, model.dense_config, tuple(blocks), plain, name)


def build(spec: ViTSpec, architectures: Mapping[str, type], config: Mapping[str, Any], device: str) -> nn.Module:
    """timm's model of `spec` from its constructor arguments, not prepared.

    Raises:
        ValueError: an unknown architecture, or arguments that it does not take.
    """
    if spec.architecture not in architectures:
        raise ValueError(f"architecture {spec.architecture!r} is unknown; expected one of {', '.join(architectures)}")
    try:
        with torch.device(device):
            model = architectures[spec.architecture](**config)
    except (TypeError, AssertionError) as e:
        raise ValueError(f"its config does not build a {spec.architecture}: {e}") from None
    data = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.preprocess.items()}
    model.pretrained_cfg = data | {"architecture": spec.name, "num_classes": model.num_classes}
    model.default_cfg = model.pretrained_cfg
    return model


def resize(model: nn.Module, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> nn.Module:
    """Give a prepared model these parameters and the widths that `masks` leaves, in place."""
    resize_layers(model, params, masks)
    emb = int(masks["emb"].sum())
    model.embed_dim = model.num_features = emb
    if not isinstance(getattr(model, "attn_pool", None), LatentPool):
        model.head_hidden_size = emb
    model.patch_embed.proj.out_channels = emb
    for info in model.feature_info:
        info["num_chs"] = emb
    return model


def tokens(model: nn.Module) -> int:
    """Tokens in the residual stream at the model's own input size."""
    return model.patch_embed.num_patches + model.num_prefix_tokens


def parts(model: nn.Module) -> tuple[Part, ...]:
    """The attention and the MLP of every block, each with its norm and residual, and the rest of the model."""
    return plain.parts(len(model.blocks))


def part_macs(model: nn.Module, part: Part, *, pooled: int | None = None, classifiers: int = 1) -> Callable[..., int]:
    """Multiply-accumulates an image of one piece of `part`, as a function of its widths.

    Args:
        pooled: tokens that attention pooling reads; None for all.
        classifiers: how many read the stream.
    """
    length, block = tokens(model), model.blocks[0]
    if part.name == "attention":
        macs, dims = plain.attention_macs(length), block.attn.span("qk_dim")
        return lambda emb, heads, qk, v: macs(emb, heads, dims * qk, v)
    if part.name == "mlp":
        return plain.mlp_macs(length, 3 if isinstance(block.mlp, GatedMlp) else 2)
    conv = model.patch_embed.proj.weight[0].numel() * model.patch_embed.num_patches
    if isinstance(pool := getattr(model, "attn_pool", None), LatentPool):
        per_channel, fixed = pool_macs(pool, pooled or length)
        return lambda emb: (conv + per_channel) * emb + fixed + pool.out_features * model.num_classes
    return lambda emb: (conv + classifiers * model.num_classes) * emb


def sample_spec(spec: ViTSpec, part: Part, widths: Sequence[int]) -> ViTSpec:
    """One block that has `widths` along the axes of `part`, and elsewhere the widest of the model."""
    return plain.sample_spec(spec, part, widths, depth=1)


def piece(
    model: nn.Module, part: Part, attention: Callable[[Tensor], Tensor], mlp: Callable[[Tensor], Tensor]
) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """A part of a one-block model as a function, and the shape of its input: the first block's `attention` or `mlp`
    with its norm and residual, stream to stream; or the `rest`, images to logits with no block in between, for which
    `model` loses its blocks."""
    if part.name != "rest":
        return {"attention": attention, "mlp": mlp}[part.name], (tokens(model), model.embed_dim)
    model.blocks = nn.Sequential()
    return model, preprocess(model)["input_size"]
