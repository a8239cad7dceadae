"""timm's SwinTransformer: windows per stage, shifted or not, patch merging, any pooling.

Every stage is a residual stream with an `emb` group of its own, `layers.0.emb` and so on; blocks are numbered through
all stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.layers import ClassifierHead, PatchEmbed
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    get_relative_position_index,
)
from timm.models.swin_transformer import WindowAttention as TimmWindowAttention
from torch import Tensor, nn

from ..layers import Attention, Layout, Linear, StreamEntry
from ..spec import BUNDLE_SIZES, KINDS, BlockWidths, Group, Part, ViTSpec
from .base import Logits
from .declare import Width, block_axes, block_widths, collect, embedding_slices, norm, resize_layers, with_axes
from .timm_layers import NORMS, is_norm, is_norm_or_none, known, mlp, mlp_ratio, mlp_refusal, name_in

NEIGHBOURS = 4
"""Tokens that patch merging joins to one; a channel of the stream is in each."""


class WindowAttention(Attention):
    """Attention inside windows, with relative position bias; under timm's name and call.

    Args:
        windows: of an image; they are folded into the batch.
    """

    def __init__(self, host: TimmWindowAttention, windows: int) -> None:
        table, head_dim = host.relative_position_bias_table, host.proj.in_features // host.num_heads
        super().__init__(
            host,
            heads=host.num_heads,
            qk_dim=head_dim,
            v_dim=head_dim,
            scale=host.scale,
            bias_table="relative_position_bias_table",
            bias_index=get_relative_position_index(*host.window_size, device="cpu" if table.is_meta else table.device),
            attn_drop=host.attn_drop.p,
            proj_drop=host.proj_drop.p,
        )
        self.windows = windows

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x` `(batch · windows, tokens, kept emb)`, `mask` `(windows, tokens, tokens)` added to the logits."""
        if mask is not None:
            mask = mask.to(x.dtype).unsqueeze(1)
        return self.attend(x, mask, windows=self.windows)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        raise ValueError("a prepared Swin model keeps its input size; call set_input_size before it is prepared")


def _shift(block: SwinTransformerBlock, place: int) -> tuple[int, ...]:
    """How far timm's constructor shifts the windows of a stage's block: half a window in every other one."""
    sides = zip(block.input_resolution, block.window_size, strict=True)
    return tuple(w // 2 if place % 2 and (block.always_partition or r > w) else 0 for r, w in sides)


def _block_refusal(block: nn.Module, place: int) -> str | None:
    if type(block) is not SwinTransformerBlock:
        return f"block type {type(block).__name__}"
    if type(block.attn) not in (TimmWindowAttention, WindowAttention):
        return f"attention type {type(block.attn).__name__}"
    if not (is_norm(block.norm1) and is_norm(block.norm2)):
        return f"norm type {type(block.norm1).__name__}"
    if (reason := mlp_refusal(block.mlp)) is not None:
        return reason
    if tuple(block.shift_size) != _shift(block, place):
        return f"windows shifted by {tuple(block.shift_size)} instead of {_shift(block, place)} in block {place}"
    return None


def _stage_refusal(stage: nn.Module, place: int) -> str | None:
    if type(stage) is not SwinTransformerStage:
        return f"stage type {type(stage).__name__}"
    merge = stage.downsample
    if place and not (type(merge) is PatchMerging and is_norm(merge.norm)):
        return f"{type(merge).__name__} instead of patch merging before stage {place}"
    if len(stage.blocks) == 0:
        return f"no blocks in stage {place}"
    return next((r for i, block in enumerate(stage.blocks) if (r := _block_refusal(block, i))), None)


def knows(model: nn.Module) -> bool:
    """Whether `model` is of this class; a subclass may compute something else."""
    return type(model) is SwinTransformer


def refusal(model: nn.Module) -> str | None:
    """Why a model of this family is not supported, or None."""
    if model.dynamic_img_size:
        return "images of varying size (strict_img_size=False)"
    if type(model.patch_embed) is not PatchEmbed:
        return f"patch embedding type {type(model.patch_embed).__name__}"
    entry = model.patch_embed.norm
    if not (isinstance(entry, StreamEntry) or is_norm_or_none(entry)):
        return f"norm type {type(entry).__name__} in the patch embedding"
    if not is_norm(model.norm):
        return "no LayerNorm after the blocks"
    if type(model.head) is not ClassifierHead:
        return f"classifier type {type(model.head).__name__}"
    return next((r for i, stage in enumerate(model.layers) if (r := _stage_refusal(stage, i))), None)


def _emb(stage: int) -> str:
    return f"layers.{stage}.emb"


def _blocks(model: nn.Module) -> Iterator[tuple[int, int, str, SwinTransformerBlock]]:
    """Stage, index in the whole model, name and module of every block."""
    every = ((s, i, block) for s, stage in enumerate(model.layers) for i, block in enumerate(stage.blocks))
    for index, (s, i, block) in enumerate(every):
        yield s, index, f"layers.{s}.blocks.{i}", block


def _spans(depths: Sequence[int]) -> list[range]:
    """Indices in the whole model of the blocks of each stage."""
    return [range(end - depth, end) for depth, end in zip(depths, accumulate(depths), strict=True)]


def _windows(block: SwinTransformerBlock) -> int:
    """Windows of an image, padded ones included."""
    return math.prod(math.ceil(r / w) for r, w in zip(block.input_resolution, block.window_size, strict=True))


def prepare(model: nn.Module) -> nn.Module:
    """Swap timm's layers for prunable ones, in place. Outputs, parameters and their names stay as they are."""
    if hasattr(model, "dense_config"):
        return model
    model.dense_config = _config(model)
    first, entry = {"emb": _emb(0)}, model.patch_embed.norm
    model.patch_embed.norm = (
        norm(entry, first, entry=True) if is_norm(entry) else with_axes(first, StreamEntry(), entry)
    )
    for s, stage in enumerate(model.layers):
        if s:
            _prepare_merge(stage.downsample, _emb(s - 1), _emb(s))
    for s, _, name, block in _blocks(model):
        stream = {"emb": _emb(s)}
        attention_axes, mlp_axes = block_axes(name, _emb(s))
        block.norm1, block.norm2 = norm(block.norm1, stream), norm(block.norm2, stream)
        block.attn = with_axes(attention_axes, WindowAttention(block.attn, _windows(block)), block.attn)
        block.mlp = mlp(block.mlp, mlp_axes)
        if block.attn_mask is not None and block.attn_mask.is_meta:
            mask = block.get_attn_mask(device="cpu", dtype=torch.float32)
            block.register_buffer("attn_mask", mask, persistent=False)
    last, width = {"emb": _emb(len(model.layers) - 1)}, model.norm.weight.numel()
    model.norm, fc = norm(model.norm, last), model.head.fc
    if isinstance(fc, nn.Linear):
        pooled = Layout((None, "emb"), (fc.in_features // width, width))  # twice the stream for `catavgmax`
        model.head.fc = with_axes(last, Linear(fc, inputs=pooled), fc)
    return model


def _prepare_merge(merge: PatchMerging, before: str, after: str) -> None:
    """Patch merging reads four neighbours of one stream and writes the next."""
    host = merge.reduction
    joined = Layout((None, "emb"), (NEIGHBOURS, host.in_features // NEIGHBOURS))
    merge.norm = norm(merge.norm, {"emb": before}, layout=joined)
    layer = Linear(host, inputs=joined, outputs=Layout.of("emb_out", host.out_features))
    merge.reduction = with_axes({"emb": before, "emb_out": after}, layer, host)


def groups(model: nn.Module, bundle_sizes: Mapping[str, int] = BUNDLE_SIZES) -> list[Group]:
    """Every prunable width of a prepared model: of each stage `emb`, then `heads`, `qk_dim`, `v_dim` and `mlp` block by
    block.

    The gate of a stream's unit sits on what every reader sees: behind the norms before blocks, patch merging and
    classifier.
    """
    blocks = list(_blocks(model))
    widths = []
    for stage in range(len(model.layers)):
        mine = [(index, name) for s, index, name, _ in blocks if s == stage]
        widths.append(Width(_emb(stage), "emb", tuple(index for index, _ in mine)))
        for index, name in mine:
            widths += block_widths(name, index)
    patches = {"patch_embed.proj.weight": 0, "patch_embed.proj.bias": 0}
    return collect(model, widths, {_emb(0): embedding_slices(model, patches, patches)}, bundle_sizes)


def _config(model: nn.Module) -> dict[str, Any]:
    """Constructor arguments that rebuild a timm model, read off the model, so that ones built by hand work as well."""
    embed, firsts = model.patch_embed, [stage.blocks[0] for stage in model.layers]
    emb = [block.norm1.weight.numel() for block in firsts]
    config = {
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": emb[0],
        "depths": [len(stage.blocks) for stage in model.layers],
        "num_heads": [block.attn.num_heads for block in firsts],
        "head_dim": [block.attn.proj.in_features // block.attn.num_heads for block in firsts],
        "window_size": [list(block.window_size) for block in firsts],
        "always_partition": firsts[0].always_partition,
        "mlp_ratio": [mlp_ratio(e, block.mlp.fc1.out_features) for e, block in zip(emb, firsts, strict=True)],
        "qkv_bias": firsts[0].attn.qkv.bias is not None,
        "norm_layer": name_in(NORMS, model.norm),
        "norm_eps": model.norm.eps,
    }
    if getattr(model.norm, "bias", None) is None and config["norm_layer"] == "layernorm":
        config["norm_bias"] = False
    if not is_norm(embed.norm):
        config["patch_norm"] = False
    return config


def preprocess(model: nn.Module) -> dict[str, Any]:
    """How images are prepared for `model`, prepared or not: timm's data config, at the model's own input size."""
    embed = model.patch_embed
    return resolve_data_config(model=model) | {"input_size": (embed.proj.in_channels, *embed.img_size)}


def spec(model: nn.Module, blocks: Sequence[BlockWidths]) -> ViTSpec:
    """The spec of a prepared model at these widths."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in preprocess(model).items()}
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
    return ViTSpec("timm_swin", type(model).__name__, model.dense_config, tuple(blocks), plain, name)


def build(spec: ViTSpec, device: str = "meta") -> nn.Module:
    """The prepared dense model of `spec`: on the meta device its structure alone, elsewhere freshly initialised.

    Raises:
        ValueError: an architecture or constructor argument this version does not know.
    """
    if spec.architecture != SwinTransformer.__name__:
        raise ValueError(f"architecture {spec.architecture!r} is unknown; expected {SwinTransformer.__name__}")
    config = {"drop_path_rate": 0.0} | dict(spec.config)
    norm_args = {"eps": config.pop("norm_eps", 1e-5)} | ({} if config.pop("norm_bias", True) else {"bias": False})
    layer = partial(known(config, "norm_layer", NORMS, "layernorm"), **norm_args)
    patch_norm = config.pop("patch_norm", True)
    try:
        with torch.device(device):
            model = SwinTransformer(**config, norm_layer=layer)
    except (TypeError, AssertionError) as e:
        raise ValueError(f"its config does not build a {spec.architecture}: {e}") from None
    if not patch_norm:
        model.patch_embed.norm = nn.Identity()
    data = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.preprocess.items()}
    model.pretrained_cfg = data | {"architecture": spec.name, "num_classes": model.num_classes}
    model.default_cfg = model.pretrained_cfg
    return prepare(model)


def resize(model: nn.Module, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> nn.Module:
    """Give a prepared model these parameters and the widths that `masks` leaves, in place."""
    resize_layers(model, params, masks)
    emb = [int(masks[_emb(s)].sum()) for s in range(len(model.layers))]
    model.embed_dim, model.num_features = emb[0], emb[-1]
    model.patch_embed.proj.out_channels = emb[0]
    for s, stage in enumerate(model.layers):
        stage.dim, model.feature_info[s]["num_chs"] = emb[s - 1 if s else 0], emb[s]
        if s:
            stage.downsample.dim, stage.downsample.out_dim = emb[s - 1], emb[s]
        for block in stage.blocks:
            block.dim = emb[s]
    model.head.in_features = emb[-1]
    model.head_hidden_size = model.head.num_features = emb[-1] * model.head.global_pool.feat_mult()
    return model


def logits(model: nn.Module, images: Tensor) -> Logits:
    """`(batch, classes)`, and nothing from a distillation token."""
    return Logits(model(images))


def tokens(model: nn.Module) -> int:
    """Tokens in the first stage's residual stream at the model's input size."""
    return model.patch_embed.num_patches


def parts(model: nn.Module) -> tuple[Part, ...]:
    """Of each stage its attentions, those in shifted windows, and its MLPs, each with norm and residual; the merges
    between stages; the patch embedding (`stem`), and what follows the last block (`head`)."""
    spans, found = _spans([len(stage.blocks) for stage in model.layers]), [Part("stem", ("emb",), ((0,),))]
    for s, (stage, span) in enumerate(zip(model.layers, spans, strict=True)):
        if s:
            found.append(Part(f"merge.{s}", ("emb", "emb"), ((spans[s - 1][-1], span[0]),)))
        shifted = [any(block.shift_size) for block in stage.blocks]
        for name, which in (("attention", False), ("shifted", True)):
            mine = tuple((i,) * 4 for i, shift in zip(span, shifted, strict=True) if shift is which)
            if mine:
                found.append(Part(f"{name}.{s}", ("emb", "heads", "qk_dim", "v_dim"), mine))
        found.append(Part(f"mlp.{s}", ("emb", "mlp"), tuple((i, i) for i in span)))
    return (*found, Part("head", ("emb",), ((spans[-1][-1],),)))


def part_macs(model: nn.Module, part: Part) -> Callable[..., int]:
    """Multiply-accumulates an image of one piece of `part`, as a function of its widths."""
    name, _, stage = part.name.partition(".")
    if name == "stem":
        conv = model.patch_embed.proj.weight[0].numel() * model.patch_embed.num_patches
        return lambda emb: conv * emb
    if name == "head":
        pooled = model.head.global_pool.feat_mult() * model.num_classes
        unpooled = math.prod(model.layers[-1].output_resolution) if model.head.global_pool.is_identity() else 1
        return lambda emb: pooled * unpooled * emb
    block, length = model.layers[int(stage)].blocks[0], math.prod(model.layers[int(stage)].output_resolution)
    if name == "merge":
        return lambda before, after: length * NEIGHBOURS * before * after
    if name == "mlp":
        return lambda emb, hidden: length * 2 * emb * hidden
    area = math.prod(block.window_size)
    padded = _windows(block) * area
    return lambda emb, heads, qk, v: padded * heads * (emb * (2 * qk + v) + v * emb + area * (qk + v))


def sample_spec(spec: ViTSpec, part: Part, widths: Sequence[int]) -> ViTSpec:
    """The stage of `part`, or for a merge the two it joins, with one block of `widths` along the axes of `part` and
    elsewhere the widest of its stage; with two such blocks where the shifted one is meant."""
    config, (name, _, stage) = spec.config, part.name.partition(".")
    last = {"stem": 0, "head": len(config["depths"]) - 1}.get(name) if not stage else int(stage)
    first, depth = last - (name == "merge"), 2 if name == "shifted" else 1
    grid = [side // patch for side, patch in zip(config["img_size"], config["patch_size"], strict=True)]
    grid = [math.ceil(side / 2**first) for side in grid]
    mine = {key: config[key][first : last + 1] for key in ("num_heads", "head_dim", "window_size", "mlp_ratio")}
    mine |= {"embed_dim": config["embed_dim"] * 2**first, "depths": [depth] * (last + 1 - first)}
    mine["img_size"] = [side * patch for side, patch in zip(grid, config["patch_size"], strict=True)]
    blocks = []
    for span in _spans(config["depths"])[first : last + 1]:
        here = {kind: max(getattr(spec.blocks[i], kind) for i in span) for kind in KINDS}
        blocks += [BlockWidths(**here)] * depth
    if name == "merge":
        blocks = [replace(block, emb=emb) for block, emb in zip(blocks, widths, strict=True)]
    else:
        blocks = [replace(block, **dict(zip(part.kinds, widths, strict=True))) for block in blocks]
    return replace(spec, config={**config, **mine}, blocks=tuple(blocks))


def piece(model: nn.Module, part: Part) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """The last block's attention or MLP with norm and residual, patch merging, the patch embedding, or what follows the
    last block."""
    name, stage = part.name.partition(".")[0], model.layers[-1]
    if name == "stem":
        return model.patch_embed, preprocess(model)["input_size"]
    if name == "merge":
        return stage.downsample, (*model.layers[0].output_resolution, model.embed_dim)
    block, tokens_of_it = stage.blocks[-1], (*stage.output_resolution, model.num_features)
    if name == "head":
        return lambda x: model.forward_head(model.norm(x)), tokens_of_it
    if name == "mlp":
        return lambda x: x + block.mlp(block.norm2(x)), (math.prod(tokens_of_it[:-1]), model.num_features)
    return lambda x: x + block._attn(block.norm1(x)), tokens_of_it
