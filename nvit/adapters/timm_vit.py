"""timm's VisionTransformer and VisionTransformerDistilled: plain, DeiT, LayerScale, registers, pre-norm, norms inside
attention and MLP, SwiGLU, RMSNorm, any pooling of tokens and pooling by a latent query."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import LayerScale as TimmLayerScale
from timm.layers.attention import Attention as TimmAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..layers import Absent, Attention, LayerScale, Layout, MergingStack, Prunable, StreamEntry
from ..layers.merging import check_merges
from ..spec import Part, ViTSpec
from .base import Logits
from .declare import EMB, block_axes, with_axes
from .merging_block import MergingBlock, merge_blocks_, merging_
from .timm_config import ACTIVATIONS, MLPS, NORMS, known, mlp_hidden, mlp_name, mlp_ratio, name_in, norm_layer
from .timm_layers import block_refusal, inner_norm, is_norm, is_norm_or_none, mlp, stream_norm
from .timm_plain import TimmPlain, embedding_config, norm_config, prepare_heads, prepare_output


class TimmViT(TimmPlain):
    """The adapter of timm's ViT and DeiT."""

    family = "timm_vit"
    architectures: ClassVar = {cls.__name__: cls for cls in (VisionTransformer, VisionTransformerDistilled)}

    def block_refusal(self, block: nn.Module) -> str | None:
        if type(block) not in (Block, MergingBlock):
            return f"block type {type(block).__name__}; only the pre-norm Block is known"
        attn = block.attn
        if not isinstance(attn, (Attention, Absent)):
            if type(attn) is not TimmAttention:
                return f"attention type {type(attn).__name__}"
            inner = next((m for m in (attn.q_norm, attn.k_norm, attn.norm) if not is_norm_or_none(m)), None)
            if inner is not None:
                return f"norm type {type(inner).__name__} in attention"
            if attn.gate is not None:
                return "gated attention output"
        return block_refusal(block)

    def prepare(self, model: nn.Module) -> nn.Module:
        if hasattr(model, "dense_config"):
            return prepare_heads(model)
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
        prepare_output(model)
        return model

    def merge_refusal(self, model: nn.Module) -> str | None:
        if model.dynamic_img_size:
            return "it takes images of any size, and how many tokens merge is fixed"
        if getattr(model.patch_drop, "prob", 0.0):
            return "it drops patches while it trains (patch_drop_rate)"
        return None

    def prefix(self, model: nn.Module) -> int:
        return model.num_prefix_tokens

    def merges(self, model: nn.Module) -> tuple[int, ...]:
        blocks = model.blocks if isinstance(model.blocks, MergingStack) else ()
        return tuple(block.merges for block in blocks)

    def merge_(self, model: nn.Module, merges: Sequence[int]) -> None:
        merges = tuple(merges) or (0,) * len(model.blocks)
        if any(merges) and (reason := self.merge_refusal(model)) is not None:
            raise ValueError(f"tokens cannot merge: {reason}")
        for i, (r, block) in enumerate(zip(merges, model.blocks, strict=False)):
            if r and isinstance(block.attn, Absent):
                raise ValueError(
                    f"tokens cannot merge in block {i}: its attention has left, whose keys say which are alike"
                )
        check_merges(merges, len(model.blocks), self.tokens(model), self.prefix(model))
        merge_blocks_(model.blocks, merges, self.prefix(model))

    def settings(self, model: nn.Module) -> dict[str, Any]:
        return super().settings(model) | {
            "final_norm": is_norm(model.norm) or is_norm(model.fc_norm),
            "fc_norm": is_norm(model.fc_norm),
            "pool_include_prefix": model.pool_include_prefix,
            "dynamic_img_size": model.dynamic_img_size,
            "dynamic_img_pad": model.patch_embed.dynamic_img_pad,
            "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
        }

    def set_image_size_(self, model: nn.Module, size: tuple[int, int]) -> None:
        """Position embeddings are interpolated as timm does it."""
        if odd := [n for n, patch in zip(size, model.patch_embed.patch_size, strict=True) if n % patch or n < patch]:
            raise ValueError(f"images of {size[0]} × {size[1]}: {odd[0]} is no multiple of the patches' side")
        model.set_input_size(tuple(size))

    def build(self, spec: ViTSpec, device: str = "meta") -> nn.Module:
        config = dict(spec.config)
        config["act_layer"] = known(config, "act_layer", ACTIVATIONS)
        config["mlp_layer"] = known(config, "mlp_layer", MLPS, "mlp")
        config["norm_layer"] = norm_layer(config)
        if "embed_norm_layer" in config:
            eps = config.pop("embed_norm_eps")
            config["embed_norm_layer"] = partial(known(config, "embed_norm_layer", NORMS), eps=eps)
        if head_dim := config.pop("head_dim", None):
            config["attn_layer"] = _attention_of(head_dim)
        return self.prepare(self.construct(spec, config, device))

    def logits(self, model: nn.Module, images: Tensor) -> Logits:
        """From the class token and, of a distilled model, from the distillation token."""
        if not isinstance(model, VisionTransformerDistilled) or not model.num_classes:
            return super().logits(model, images)
        x = model.forward_features(images)
        return Logits(model.head(model.head_drop(x[:, 0])), model.head_dist(model.head_drop(x[:, 1])))

    def pooled_tokens(self, model: nn.Module) -> int:
        return self.tokens(model) if model.pool_include_prefix else model.patch_embed.num_patches

    def classifiers(self, model: nn.Module) -> int:
        return 2 if isinstance(model, VisionTransformerDistilled) else 1

    def steps(self, model: nn.Module, part: Part) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        block = model.blocks[0]
        if part.tokens is not None:
            merging_(block, part.merged, self.prefix(model))
            whole = part.tokens == self.tokens(model)  # whose sizes nobody has to add

            def attention(x: Tensor) -> Tensor:
                sizes = None if whole else x.new_ones(x.shape[:2], dtype=torch.float32)
                return block.attention_step(x, (sizes, None))[0]

            return attention, block.mlp_step
        return (
            lambda x: x + block.ls1(block.attn(block.norm1(x))),
            lambda x: x + block.ls2(block.mlp(block.norm2(x))),
        )


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
        "act_layer": name_in(ACTIVATIONS, block.mlp.act),
        "mlp_layer": mlp_name(block.mlp),
    }
    if is_norm(embed.norm):
        config["embed_norm_layer"] = name_in(NORMS, embed.norm)
        config["embed_norm_eps"] = embed.norm.eps
    if block.attn.head_dim != model.embed_dim // block.attn.num_heads:
        config["head_dim"] = block.attn.head_dim
    return config | norm_config(model)


def _attention_of(head_dim: int) -> type:
    """timm's attention with a head width of its own, as the class that timm's blocks ask for."""
    return type(
        "Attention", (), {"__new__": lambda cls, *args, **more: TimmAttention(*args, attn_head_dim=head_dim, **more)}
    )
