"""timm's Eva: EVA, EVA-02, Perception Encoder, DINOv3, RoPE-ViT and others of its pre-norm blocks; rotary positions
that are axial, learned or absent, and any pooling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from timm.layers import AttentionRope, GluMlp, SwiGLU
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from ..layers import Attention, Layout, Prunable, StreamEntry, head_layout
from ..layers.functional import Rotary
from ..spec import Part, ViTSpec
from .declare import EMB, fill_buffers_, with_axes
from .rotary_table import RotaryTable, keep_table_
from .scaled_block import ScaledBlock, scaled_block
from .timm_config import known, mlp_ratio, norm_layer
from .timm_layers import block_refusal, inner_norm, is_norm, is_norm_or_none, stream_norm
from .timm_plain import TimmPlain, embedding_config, norm_config, prepare_heads, prepare_output

ATTENTIONS = {"eva": EvaAttention, "rope": AttentionRope}
ROPES = {
    "cat": RotaryEmbeddingCat,
    "mixed": RotaryEmbeddingMixed,
    "dinov3": RotaryEmbeddingDinoV3,
    "mrope": RotaryEmbeddingMRope,
}
ROPE_SETTINGS = {
    "temperature": "rope_temperature",
    "grid_offset": "rope_grid_offset",
    "grid_indexing": "rope_grid_indexing",
    "rotate_half": "rope_rotate_half",
    "shift_coords": "rope_shift_coords",
    "jitter_coords": "rope_jitter_coords",
    "rescale_coords": "rope_rescale_coords",
    "mrope_section": "rope_mrope_section",
    "ref_feat_shape": "ref_feat_shape",
}
"""Attributes of the rotary embeddings and the model's constructor arguments for them."""


class RotaryAttention(Attention):
    """Attention that takes its rotary table as timm's blocks pass it.

    Args:
        prefix: tokens at the front that have no place.
    """

    def __init__(self, host: nn.Module, *, prefix: int, **more: Any) -> None:
        super().__init__(host, **more)
        self.prefix = prefix

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None
    ) -> Tensor:
        """`rope`: sines and cosines side by side, `(tokens, 2·dims)` and broadcastable as in `Rotary`."""
        turn = None if rope is None else Rotary(*rope.chunk(2, dim=-1), prefix=self.prefix)
        return super().forward(x, attn_mask, is_causal, turn)


class TimmEva(TimmPlain):
    """The adapter of timm's Eva. A unit of `qk_dim` is a rotary pair where positions turn.

    Learned frequencies (`rope.freqs`) belong to all blocks and stay whole; each block reads its own part of them.
    """

    family = "timm_eva"
    architectures: ClassVar = {"Eva": Eva}

    def merge_refusal(self, model: nn.Module) -> str | None:
        return "every block turns tokens by their places or is given them, and a merged token has several"

    def refusal(self, model: nn.Module) -> str | None:
        if model.rope is not None and type(model.rope) not in (*ROPES.values(), RotaryTable):
            return f"rotary embedding type {type(model.rope).__name__}"
        return super().refusal(model)

    def block_refusal(self, block: nn.Module) -> str | None:
        if not isinstance(block, ScaledBlock):
            if type(block) is not EvaBlock:
                return f"block type {type(block).__name__}; only the pre-norm EvaBlock is known"
            attn = block.attn
            if type(attn) not in ATTENTIONS.values():
                return f"attention type {type(attn).__name__}"
            if getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
                return f"grouped-query attention ({attn.num_kv_heads} key heads for {attn.num_heads} query heads)"
            if attn.gate is not None:
                return "gated attention output"
            inner = next((m for m in (attn.q_norm, attn.k_norm, attn.norm) if not is_norm_or_none(m)), None)
            if inner is not None:
                return f"norm type {type(inner).__name__} in attention"
        return block_refusal(block)

    def prepare(self, model: nn.Module) -> nn.Module:
        if hasattr(model, "dense_config"):
            return prepare_heads(model)
        model.dense_config = _config(model)
        if type(model.rope) is RotaryEmbeddingDinoV3:
            keep_table_(model.rope)
        entry = model.norm_pre
        model.norm_pre = stream_norm(entry, entry=True) if is_norm(entry) else with_axes(EMB, StreamEntry(), entry)
        for i, block in enumerate(model.blocks):
            model.blocks[i] = scaled_block(block, i, partial(_attention, rope=model.rope))
        prepare_output(model)
        return model

    def settings(self, model: nn.Module) -> dict[str, Any]:
        return super().settings(model) | {
            "use_post_transformer_norm": is_norm(model.norm),
            "use_fc_norm": is_norm(model.fc_norm),
            "dynamic_img_size": model.dynamic_img_size,
            "dynamic_img_pad": model.patch_embed.dynamic_img_pad,
            "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
        }

    def build(self, spec: ViTSpec, device: str = "meta") -> nn.Module:
        config = dict(spec.config)
        known(dict(config), "attn_type", ATTENTIONS)
        if config.get("use_rot_pos_emb"):
            known(dict(config), "rope_type", ROPES)
        config["norm_layer"] = norm_layer(config)
        model = self.construct(spec, config, device)
        if model.rope is not None:
            fill_buffers_(model.rope)
        return self.prepare(model)

    def sample_spec(self, spec: ViTSpec, part: Part, widths: Sequence[int]) -> ViTSpec:
        if part.name == "rest" and spec.config.get("rope_type") == "mixed":  # computes the angles of all blocks
            return replace(spec, blocks=tuple(replace(b, emb=widths[0]) for b in spec.blocks))
        return super().sample_spec(spec, part, widths)

    def steps(self, model: nn.Module, part: Part) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        block, rope = model.blocks[0], None
        if model.rope is not None:
            rope = model.rope.get_embed(shape=model.patch_embed.grid_size)
            rope = rope[0] if isinstance(model.rope, RotaryEmbeddingMixed) else rope
        return partial(block.attention_step, rope=rope), block.mlp_step


def _attention(host: nn.Module, axes: Mapping[str, str], rope: nn.Module | None) -> Prunable:
    pairs = None if rope is None else "half" if host.rotate_half else "interleaved"
    qk_dim = host.head_dim if pairs is None else host.head_dim // 2
    dims = head_layout(qk_dim, pairs)
    layer = RotaryAttention(
        host,
        prefix=host.num_prefix_tokens,
        heads=host.num_heads,
        qk_dim=qk_dim,
        v_dim=host.head_dim,
        scale=host.scale,
        inputs=("qkv",) if host.qkv is not None else ("q_proj", "k_proj", "v_proj"),
        biases=("q_bias", None, "v_bias") if getattr(host, "q_bias", None) is not None else None,
        q_norm=inner_norm(host.q_norm, dims, scored=True),
        k_norm=inner_norm(host.k_norm, dims),
        norm=inner_norm(host.norm, Layout(("heads", "v_dim"), (host.num_heads, host.head_dim))),
        pairs=pairs,
        shared_heads=isinstance(rope, RotaryEmbeddingMixed),
        attn_drop=host.attn_drop.p,
        proj_drop=host.proj_drop.p,
    )
    return with_axes(axes, layer, host)


def _config(model: nn.Module) -> dict[str, Any]:
    """Constructor arguments that rebuild a timm model, read off the model, so that ones built by hand work as well."""
    block, pool = model.blocks[0], model.attn_pool
    config = embedding_config(model) | {
        "qkv_bias": getattr(block.attn, "q_bias", None) is not None
        or (block.attn.q_proj if block.attn.qkv is None else block.attn.qkv).bias is not None,
        "qkv_fused": block.attn.qkv is not None,
        "qk_norm": is_norm(block.attn.q_norm),
        "attn_type": next(name for name, cls in ATTENTIONS.items() if type(block.attn) is cls),
        "scale_attn_inner": is_norm(block.attn.norm),
        "mlp_ratio": mlp_ratio(model.embed_dim, block.mlp.fc2.in_features),
        "swiglu_mlp": isinstance(block.mlp, (GluMlp, SwiGLU)),
        "swiglu_align_to": int(isinstance(block.mlp, SwiGLU)),  # to 1 changes no width and asks for separate layers
        "scale_mlp": is_norm(block.mlp.norm),
        "init_values": None if block.gamma_1 is None else 1.0,
        "attn_only_layer_scale": block.gamma_1 is not None and block.gamma_2 is None,
        "class_token": model.cls_token is not None,
        "num_reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "no_embed_class": model.no_embed_class,
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_rot_pos_emb": model.rope is not None,
        "use_pre_transformer_norm": is_norm(model.norm_pre),
    }
    if pool is not None:
        config["attn_pool_num_heads"] = pool.num_heads
        config["attn_pool_mlp_ratio"] = mlp_ratio(model.embed_dim, pool.mlp.fc1.out_features)
    if model.rope is not None:
        config["rope_type"] = next(name for name, cls in ROPES.items() if type(model.rope) is cls)
        settings = {key: getattr(model.rope, name) for name, key in ROPE_SETTINGS.items() if hasattr(model.rope, name)}
        config |= {key: list(v) if isinstance(v, tuple) else v for key, v in settings.items()}
    return config | norm_config(model)
