"""timm's SwinTransformer: windows per stage, shifted or not, patch merging, any pooling.

Every stage is a residual stream with an `emb` group of its own, `layers.0.emb` and so on; blocks are numbered through
all stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from timm.layers import ClassifierHead, PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock, SwinTransformerStage
from timm.models.swin_transformer import WindowAttention as TimmWindowAttention
from torch import Tensor, nn

from ..layers import Layout, Linear, Prunable, StreamEntry
from ..spec import BUNDLE_SIZES, Group, ViTSpec
from .declare import Width, block_axes, block_widths, collect, embedding_slices, norm, resize_layers, with_axes
from .feature_maps import FeatureMaps
from .timm_config import mlp_ratio, norm_config, norm_layer
from .timm_host import TimmAdapter
from .timm_layers import is_norm, is_norm_or_none, mlp, mlp_refusal, stem_refusal
from .timm_swin_parts import NEIGHBOURS, SwinParts
from .timm_swin_windows import WindowAttention, shift_of, windows_of
from .tower import restored_width


class TimmSwin(SwinParts, FeatureMaps, TimmAdapter):
    """The adapter of timm's Swin; the part about latency is `SwinParts`."""

    family = "timm_swin"
    architectures: ClassVar = {"SwinTransformer": SwinTransformer}

    def merge_refusal(self, model: nn.Module) -> str | None:
        return "windows forbid it: attention stays inside one, which needs all of its tokens at their places"

    def refusal(self, model: nn.Module) -> str | None:
        if model.dynamic_img_size:
            return "images of varying size (strict_img_size=False)"
        if type(model.patch_embed) is not PatchEmbed:
            return f"patch embedding type {type(model.patch_embed).__name__}"
        if (stem := stem_refusal(model.patch_embed)) is not None:
            return stem
        entry = model.patch_embed.norm
        if not (isinstance(entry, StreamEntry) or is_norm_or_none(entry)):
            return f"norm type {type(entry).__name__} in the patch embedding"
        if not is_norm(model.norm):
            return "no LayerNorm after the blocks"
        if type(model.head) is not ClassifierHead:
            return f"classifier type {type(model.head).__name__}"
        return next((r for i, stage in enumerate(model.layers) if (r := _stage_refusal(stage, i))), None)

    def prepare(self, model: nn.Module) -> nn.Module:
        if hasattr(model, "dense_config"):
            return _prepare_head(model)
        model.dense_config = _config(model)
        first, entry = {"emb": _emb(0)}, model.patch_embed.norm
        model.patch_embed.norm = (
            norm(entry, first, entry=True) if is_norm(entry) else with_axes(first, StreamEntry(), entry)
        )
        for s, stage in enumerate(model.layers):
            if s:
                _prepare_merge(stage.downsample, _emb(s - 1), _emb(s))
        for s, _, name, block in _placed(model):
            stream = {"emb": _emb(s)}
            attention_axes, mlp_axes = block_axes(name, _emb(s))
            block.norm1, block.norm2 = norm(block.norm1, stream), norm(block.norm2, stream)
            block.attn = with_axes(attention_axes, WindowAttention(block.attn, windows_of(block)), block.attn)
            block.mlp = mlp(block.mlp, mlp_axes)
            if block.attn_mask is not None and block.attn_mask.is_meta:
                mask = block.get_attn_mask(device="cpu", dtype=torch.float32)
                block.register_buffer("attn_mask", mask, persistent=False)
        last = {"emb": _emb(len(model.layers) - 1)}
        model.norm = norm(model.norm, last)
        return _prepare_head(model)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [block for stage in model.layers for block in stage.blocks]

    def groups(self, model: nn.Module, bundle_sizes: Mapping[str, int] = BUNDLE_SIZES) -> list[Group]:
        """Every prunable width: of each stage `emb`, then `heads`, `qk_dim`, `v_dim` and `mlp` block by block.

        The gate of a stream's unit sits on what every reader sees: behind the norms before blocks, patch merging and
        classifier.
        """
        blocks = list(_placed(model))
        widths = []
        for stage in range(len(model.layers)):
            mine = [(index, name) for s, index, name, _ in blocks if s == stage]
            widths.append(Width(_emb(stage), "emb", tuple(index for index, _ in mine)))
            for index, name in mine:
                widths += block_widths(name, index)
        patches = {"patch_embed.proj.weight": 0, "patch_embed.proj.bias": 0}
        return collect(model, widths, {_emb(0): embedding_slices(model, patches, patches)}, bundle_sizes)

    def build(self, spec: ViTSpec, device: str = "meta") -> nn.Module:
        config = {"drop_path_rate": 0.0} | dict(spec.config)
        config["norm_layer"] = norm_layer(config, eps=1e-5)
        patch_norm = config.pop("patch_norm", True)
        model = self.construct(spec, config, device)
        if not patch_norm:
            model.patch_embed.norm = nn.Identity()
        return self.prepare(model)

    def resize(self, model: nn.Module, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> nn.Module:
        resize_layers(model, params, masks)
        emb = [int(masks[_emb(s)].sum()) for s in range(len(model.layers))]
        model.embed_dim, model.num_features = emb[0], restored_width(model) or emb[-1]
        model.patch_embed.proj.out_channels = emb[0]
        for s, stage in enumerate(model.layers):
            stage.dim, model.feature_info[s]["num_chs"] = emb[s - 1 if s else 0], emb[s]
            if s:
                stage.downsample.dim, stage.downsample.out_dim = emb[s - 1], emb[s]
            for block in stage.blocks:
                block.dim = emb[s]
        model.head.in_features = model.num_features
        model.head_hidden_size = model.head.num_features = model.num_features * model.head.global_pool.feat_mult()
        return model

    def headless_(self, model: nn.Module) -> None:
        model.reset_classifier(0)
        model.class_names = ()

    def feature_map(self, model: nn.Module, images: Tensor) -> Tensor:
        return model.forward_features(images)

    def map_shape(self, model: nn.Module) -> tuple[int, int, int]:
        return (*model.layers[-1].output_resolution, model.num_features)

    def map_reader(self, model: nn.Module, layer: nn.Linear) -> Prunable:
        """The last stage's stream."""
        inputs = Layout.of("emb", layer.in_features)
        return with_axes({"emb": _emb(len(model.layers) - 1)}, Linear(layer, inputs=inputs), layer)

    def tokens(self, model: nn.Module) -> int:
        """Tokens in the first stage's residual stream."""
        return model.patch_embed.num_patches


def _emb(stage: int) -> str:
    return f"layers.{stage}.emb"


def _placed(model: nn.Module) -> Iterator[tuple[int, int, str, SwinTransformerBlock]]:
    """Stage, index in the whole model, name and module of every block."""
    every = ((s, i, block) for s, stage in enumerate(model.layers) for i, block in enumerate(stage.blocks))
    for index, (s, i, block) in enumerate(every):
        yield s, index, f"layers.{s}.blocks.{i}", block


def _stage_refusal(stage: nn.Module, place: int) -> str | None:
    if type(stage) is not SwinTransformerStage:
        return f"stage type {type(stage).__name__}"
    merge = stage.downsample
    if place and not (type(merge) is PatchMerging and is_norm(merge.norm)):
        return f"{type(merge).__name__} instead of patch merging before stage {place}"
    if len(stage.blocks) == 0:
        return f"no blocks in stage {place}"
    return next((r for i, block in enumerate(stage.blocks) if (r := _block_refusal(block, i))), None)


def _block_refusal(block: nn.Module, place: int) -> str | None:
    if type(block) is not SwinTransformerBlock:
        return f"block type {type(block).__name__}"
    if type(block.attn) not in (TimmWindowAttention, WindowAttention):
        return f"attention type {type(block.attn).__name__}"
    if not (is_norm(block.norm1) and is_norm(block.norm2)):
        return f"norm type {type(block.norm1).__name__}"
    if (reason := mlp_refusal(block.mlp)) is not None:
        return reason
    if tuple(block.shift_size) != shift_of(block, place):
        return f"windows shifted by {tuple(block.shift_size)} instead of {shift_of(block, place)} in block {place}"
    return None


def _prepare_head(model: nn.Module) -> nn.Module:
    """Make a plain linear classifier prunable; returns the model."""
    fc, width = model.head.fc, model.norm.weight.numel()
    if type(fc) is nn.Linear:
        pooled = Layout((None, "emb"), (fc.in_features // width, width))  # twice the stream for `catavgmax`
        model.head.fc = with_axes({"emb": _emb(len(model.layers) - 1)}, Linear(fc, inputs=pooled), fc)
    return model


def _prepare_merge(merge: PatchMerging, before: str, after: str) -> None:
    """Patch merging reads four neighbours of one stream and writes the next."""
    host = merge.reduction
    joined = Layout((None, "emb"), (NEIGHBOURS, host.in_features // NEIGHBOURS))
    merge.norm = norm(merge.norm, {"emb": before}, layout=joined)
    layer = Linear(host, inputs=joined, outputs=Layout.of("emb_out", host.out_features))
    merge.reduction = with_axes({"emb": before, "emb_out": after}, layer, host)


def _config(model: nn.Module) -> dict[str, Any]:
    """Constructor arguments that rebuild a timm model, read off the model, so that ones built by hand work as well."""
    embed, firsts = model.patch_embed, [stage.blocks[0] for stage in model.layers]
    emb = [block.norm1.weight.numel() for block in firsts]
    config = {
        "patch_size": list(embed.patch_size),
        "embed_dim": emb[0],
        "depths": [len(stage.blocks) for stage in model.layers],
        "num_heads": [block.attn.num_heads for block in firsts],
        "head_dim": [block.attn.proj.in_features // block.attn.num_heads for block in firsts],
        "window_size": [list(block.window_size) for block in firsts],
        "always_partition": firsts[0].always_partition,
        "mlp_ratio": [mlp_ratio(e, block.mlp.fc1.out_features) for e, block in zip(emb, firsts, strict=True)],
        "qkv_bias": firsts[0].attn.qkv.bias is not None,
        **norm_config(model.norm, model.norm),
    }
    if not is_norm(embed.norm):
        config["patch_norm"] = False
    return config
