"""timm's VisionTransformer and VisionTransformerDistilled: plain, DeiT, LayerScale, registers, pre-norm,
q/k norm, SwiGLU, any pooling but attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.layers import GluMlp, PatchEmbed, QuickGELU, SwiGLU
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import LayerScale as TimmLayerScale
from timm.layers import Mlp as TimmMlp
from timm.layers.activations import GELUTanh
from timm.layers.attention import Attention as TimmAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..modules import Attention, GatedMlp, LayerScale, Layout, Linear, Mlp, Norm, Prunable, StreamEntry
from ..spec import BUNDLE_SIZES, BlockWidths, Group, ViTSpec
from .declare import (
    Width,
    block_axes,
    block_widths,
    collect,
    embedding_slices,
    norm,
    resize_layers,
    with_axes,
)

ARCHITECTURES = {cls.__name__: cls for cls in (VisionTransformer, VisionTransformerDistilled)}
ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": GELUTanh, "quick_gelu": QuickGELU, "relu": nn.ReLU, "silu": nn.SiLU}
MLPS: dict[str, Callable[..., nn.Module]] = {
    "mlp": TimmMlp,
    "glu": GluMlp,
    "glu_gate_first": partial(GluMlp, gate_last=False),
    "swiglu": SwiGLU,
}
"""How timm's MLPs are named in a spec; `glu_gate_first` with SiLU is the packed SwiGLU of DINOv2's giant."""
EMB = {"emb": "emb"}


def _is_norm(m: nn.Module) -> bool:
    return type(m) in (nn.LayerNorm, TimmLayerNorm, Norm) and m.weight is not None


def _block_refusal(block: nn.Module) -> str | None:
    if type(block) is not Block:
        return f"block type {type(block).__name__}; only the pre-norm Block is known"
    attn, mlp = block.attn, block.mlp
    if not isinstance(attn, Attention):
        if type(attn) is not TimmAttention:
            return f"attention type {type(attn).__name__}"
        for norm in (attn.q_norm, attn.k_norm):
            if not (isinstance(norm, nn.Identity) or _is_norm(norm)):
                return f"q/k norm type {type(norm).__name__} in attention"
        if not isinstance(attn.norm, nn.Identity):
            return "a norm on the attention output"
        if attn.gate is not None:
            return "gated attention output"
    if not isinstance(mlp, (Mlp, GatedMlp)):
        if type(mlp) not in (TimmMlp, GluMlp, SwiGLU) or not isinstance(mlp.fc2, nn.Linear):
            return f"MLP type {type(mlp).__name__}"
        if not isinstance(mlp.norm, nn.Identity):
            return "a norm inside the MLP"
        if type(mlp.act) not in ACTIVATIONS.values():
            return f"activation {type(mlp.act).__name__}"
    if not (_is_norm(block.norm1) and _is_norm(block.norm2)):
        return f"norm type {type(block.norm1).__name__}"
    return None


def refusal(model: nn.Module) -> str | None:
    """Why `model` is not one that this adapter knows, or None."""
    if type(model) not in ARCHITECTURES.values():
        return f"model class {type(model).__name__}"
    if model.attn_pool is not None:
        return "attention pooling"
    if type(model.patch_embed) is not PatchEmbed:
        return f"patch embedding type {type(model.patch_embed).__name__}"
    if not isinstance(model.patch_embed.norm, nn.Identity):
        return "a norm in the patch embedding"
    if not (isinstance(model.norm_pre, (nn.Identity, StreamEntry)) or _is_norm(model.norm_pre)):
        return f"norm type {type(model.norm_pre).__name__} before the blocks"
    last = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    if not _is_norm(last):
        return "no LayerNorm after the blocks"
    if len(model.blocks) == 0:
        return "no blocks"
    return next((r for r in map(_block_refusal, model.blocks) if r), None)


def _norm(host: nn.Module, entry: bool = False) -> nn.Module:
    return host if isinstance(host, nn.Identity) else norm(host, EMB, entry=entry)


def _head(host: nn.Module) -> nn.Module:
    if not isinstance(host, nn.Linear):
        return host
    return with_axes(EMB, Linear(host, inputs=Layout.of("emb", host.in_features)), host)


def _attention(host: TimmAttention, axes: Mapping[str, str]) -> Prunable:
    def head_norm(m: nn.Module, scored: bool) -> Norm | None:
        return None if isinstance(m, nn.Identity) else norm(m, {}, layout=dims, scored=scored)

    dims = Layout.of("qk_dim", host.head_dim)
    layer = Attention(
        host,
        heads=host.num_heads,
        qk_dim=host.head_dim,
        v_dim=host.head_dim,
        scale=host.scale,
        q_norm=head_norm(host.q_norm, scored=True),
        k_norm=head_norm(host.k_norm, scored=False),
        attn_drop=host.attn_drop.p,
        proj_drop=host.proj_drop.p,
    )
    return with_axes(axes, layer, host)


def _mlp(host: nn.Module, axes: Mapping[str, str]) -> Prunable:
    if type(host) is TimmMlp:
        return with_axes(axes, Mlp(host, host.act, drop=host.drop2.p), host)
    first = [n for n in ("fc1", "fc1_g", "fc1_x") if hasattr(host, n)]
    gate_last = getattr(host, "gate_last", False)
    return with_axes(axes, GatedMlp(host, host.act, first=first, drop=host.drop2.p, gate_last=gate_last), host)


def _mlp_name(mlp: nn.Module) -> str:
    """The key of `MLPS` for a timm MLP that is not yet prepared."""
    if type(mlp) is GluMlp:
        return "glu" if mlp.gate_last else "glu_gate_first"
    return "swiglu" if type(mlp) is SwiGLU else "mlp"


def prepare(model: nn.Module) -> nn.Module:
    """Swap timm's layers for prunable ones, in place. Outputs, parameters and their names stay as they are.

    Raises:
        ValueError: a model this adapter does not know, with the reason.
    """
    if reason := refusal(model):
        raise ValueError(f"{type(model).__name__} is not supported: {reason}")
    if hasattr(model, "dense_config"):
        return model
    model.dense_config = _config(model)
    entry = model.norm_pre
    model.norm_pre = _norm(entry, entry=True) if _is_norm(entry) else with_axes(EMB, StreamEntry(), entry)
    for i, block in enumerate(model.blocks):
        block.norm1, block.norm2 = _norm(block.norm1), _norm(block.norm2)
        attention_axes, mlp_axes = block_axes(f"blocks.{i}")
        block.attn, block.mlp = _attention(block.attn, attention_axes), _mlp(block.mlp, mlp_axes)
        for name in ("ls1", "ls2"):
            if isinstance(getattr(block, name), TimmLayerScale):
                scale = getattr(block, name)
                setattr(block, name, with_axes(EMB, LayerScale(scale.gamma), scale))
    model.norm, model.fc_norm = _norm(model.norm), _norm(model.fc_norm)
    model.head = _head(model.head)
    if isinstance(model, VisionTransformerDistilled):
        model.head_dist = _head(model.head_dist)
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


def _ratio(emb: int, hidden: int) -> float:
    """`mlp_ratio` from which timm's `int(emb * ratio)` gets `hidden` back."""
    ratio = hidden / emb
    return ratio if int(emb * ratio) == hidden else (hidden + 0.5) / emb


def _config(model: nn.Module) -> dict[str, Any]:
    """Constructor arguments that rebuild a timm model, read off the model, so that ones built by hand work as well."""
    block, embed = model.blocks[0], model.patch_embed
    first = getattr(block.mlp, "fc1", None) or block.mlp.fc1_g
    norm_like = next(m for m in (model.norm, model.fc_norm) if _is_norm(m))
    config = {
        "img_size": list(embed.img_size) if embed.img_size else None,
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": _ratio(model.embed_dim, first.out_features),
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "proj_bias": block.attn.proj.bias is not None,
        "init_values": None if isinstance(block.ls1, nn.Identity) else 1.0,
        "class_token": model.has_class_token,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": _is_norm(model.norm_pre),
        "fc_norm": _is_norm(model.fc_norm),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "act_layer": next(name for name, cls in ACTIVATIONS.items() if type(block.mlp.act) is cls),
        "norm_eps": norm_like.eps,
    }
    if (mlp := _mlp_name(block.mlp)) != "mlp":
        config["mlp_layer"] = mlp
    if norm_like.bias is None:
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
    eps = config.pop("norm_eps", 1e-6)
    if config.get("act_layer") not in ACTIVATIONS:
        raise ValueError(f"act_layer {config.get('act_layer')!r} is unknown; expected one of {', '.join(ACTIVATIONS)}")
    config["act_layer"] = ACTIVATIONS[config["act_layer"]]
    norm = partial(TimmLayerNorm, eps=eps, bias=config.pop("norm_bias", True))
    if (mlp := config.pop("mlp_layer", "mlp")) not in MLPS:
        raise ValueError(f"mlp_layer {mlp!r} is unknown; expected one of {', '.join(MLPS)}")
    config["mlp_layer"] = MLPS[mlp]
    if head_dim := config.pop("head_dim", None):
        config["attn_layer"] = _attention_of(head_dim)
    try:
        with torch.device(device):
            model = ARCHITECTURES[spec.architecture](**config, norm_layer=norm)
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
    model.embed_dim = model.num_features = model.head_hidden_size = emb
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


def part(model: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """`attention` or `mlp` of the first block with its norm and residual, stream to stream; or the `rest`, images to
    logits with no block in between."""
    block = model.blocks[0]
    if name == "attention":
        return lambda x: x + block.ls1(block.attn(block.norm1(x)))
    if name == "mlp":
        return lambda x: x + block.ls2(block.mlp(block.norm2(x)))
    model.blocks = nn.Sequential()
    return model


def mlp_projections(model: nn.Module) -> int:
    """Matrices of hidden × stream width in an MLP: fc1 and fc2, or with a gate three."""
    return 3 if isinstance(model.blocks[0].mlp, GatedMlp) else 2


def rest_macs_per_channel(model: nn.Module) -> float:
    """Multiply-accumulates an image outside the blocks, per channel of the stream: patch embedding and classifiers."""
    conv = model.patch_embed.proj.weight[0].numel() * model.patch_embed.num_patches
    heads = 2 if isinstance(model, VisionTransformerDistilled) else 1
    return conv + heads * model.num_classes
