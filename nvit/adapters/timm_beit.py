"""timm's Beit: BEiT and BEiT v2, with relative position bias in every block or one for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from timm.layers import SwiGLU
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit, Block, gen_relative_position_index
from torch import Tensor, nn

from ..layers import Attention, Prunable, StreamEntry
from ..spec import BUNDLE_SIZES, BlockWidths, Group, Part, ViTSpec
from . import timm_plain
from .base import Logits
from .declare import fill_buffers_, with_axes
from .scaled_block import ScaledBlock, block_refusal, scaled_block
from .timm_layers import is_norm, mlp_ratio
from .timm_plain import EMB, embedding_config, norm_config, norm_layer, prepare_output
from .timm_plain import parts as parts
from .timm_plain import preprocess as preprocess
from .timm_plain import resize as resize
from .timm_plain import sample_spec as sample_spec
from .timm_plain import tokens as tokens

ARCHITECTURES = {"Beit": Beit}


class BiasedAttention(Attention):
    """Attention that takes the position bias that all blocks share as timm's blocks pass it."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """`shared_rel_pos_bias`: `(dense heads, tokens, tokens)`."""
        if shared_rel_pos_bias is None:
            return self.attend(x)
        bias = shared_rel_pos_bias if self.table_heads is None else shared_rel_pos_bias[self.table_heads]
        return self.attend(x, bias.unsqueeze(0))


def knows(model: nn.Module) -> bool:
    """Whether `model` is of this class; a subclass may compute something else."""
    return type(model) is Beit


def _block_refusal(block: nn.Module) -> str | None:
    if not isinstance(block, ScaledBlock):
        if type(block) is not Block:
            return f"block type {type(block).__name__}"
        if type(block.attn) is not BeitAttention:
            return f"attention type {type(block.attn).__name__}"
    return block_refusal(block)


def refusal(model: nn.Module) -> str | None:
    """Why a model of this family is not supported, or None."""
    return timm_plain.refusal(model, _block_refusal)


def _attention(host: nn.Module, axes: Mapping[str, str], shared_bias: bool) -> Prunable:
    dim = host.qkv.out_features // (3 * host.num_heads)
    own_bias = host.relative_position_bias_table is not None
    weight, places = host.qkv.weight, gen_relative_position_index(host.window_size) if own_bias else None
    layer = BiasedAttention(
        host,
        heads=host.num_heads,
        qk_dim=dim,
        v_dim=dim,
        scale=host.scale,
        biases=None if host.q_bias is None else ("q_bias", None, "v_bias"),
        bias_table="relative_position_bias_table" if own_bias else None,
        bias_index=places if places is None or weight.is_meta else places.to(weight.device),
        shared_heads=shared_bias,
        attn_drop=host.attn_drop.p,
        proj_drop=host.proj_drop.p,
    )
    return with_axes(axes, layer, host)


def prepare(model: nn.Module) -> nn.Module:
    """Swap timm's layers for prunable ones, in place. Outputs, parameters and their names stay as they are."""
    if hasattr(model, "dense_config"):
        return model
    model.dense_config = _config(model)
    model.pos_drop = nn.Sequential(model.pos_drop, with_axes(EMB, StreamEntry(), model.pos_drop))
    for i, block in enumerate(model.blocks):
        model.blocks[i] = scaled_block(block, i, partial(_attention, shared_bias=model.rel_pos_bias is not None))
    prepare_output(model)
    return model


def groups(model: nn.Module, bundle_sizes: Mapping[str, int] = BUNDLE_SIZES) -> list[Group]:
    """Every prunable width of a prepared model, see `timm_plain.groups`.

    A head takes its column of the block's position bias with it; a bias that all blocks share stays whole.
    """
    return timm_plain.groups(model, bundle_sizes)


def _config(model: nn.Module) -> dict[str, Any]:
    """Constructor arguments that rebuild a timm model, read off the model, so that ones built by hand work as well."""
    block = model.blocks[0]
    return embedding_config(model) | {
        "qkv_bias": block.attn.q_bias is not None,
        "mlp_ratio": mlp_ratio(model.embed_dim, block.mlp.fc2.in_features),
        "swiglu_mlp": isinstance(block.mlp, SwiGLU),
        "scale_mlp": is_norm(block.mlp.norm),
        "init_values": None if block.gamma_1 is None else 1.0,
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_rel_pos_bias": block.attn.relative_position_bias_table is not None,
        "use_shared_rel_pos_bias": model.rel_pos_bias is not None,
        "use_fc_norm": is_norm(model.fc_norm),
        **norm_config(model),
    }


def spec(model: nn.Module, blocks: Sequence[BlockWidths]) -> ViTSpec:
    """The spec of a prepared model at these widths."""
    return timm_plain.spec("timm_beit", model, blocks)


def build(spec: ViTSpec, device: str = "meta") -> nn.Module:
    """The prepared dense model of `spec`: on the meta device its structure alone, elsewhere freshly initialised.

    Raises:
        ValueError: an architecture or constructor argument this version does not know.
    """
    config = dict(spec.config)
    config["norm_layer"] = norm_layer(config)
    model = timm_plain.build(spec, ARCHITECTURES, config, device)
    if model.rel_pos_bias is not None:
        fill_buffers_(model.rel_pos_bias)
    return prepare(model)


def logits(model: nn.Module, images: Tensor) -> Logits:
    """`(batch, classes)` and no distillation token's."""
    return Logits(model(images))


def part_macs(model: nn.Module, part: Part) -> Callable[..., int]:
    """Multiply-accumulates an image of one piece of `part`, as a function of its widths."""
    return timm_plain.part_macs(model, part)


def piece(model: nn.Module, part: Part) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """A part of a one-block model as a function, see `timm_plain.piece`."""
    block = model.blocks[0]
    shared = None if model.rel_pos_bias is None else model.rel_pos_bias()
    attention = partial(block.attention_step, shared_rel_pos_bias=shared)
    return timm_plain.piece(model, part, attention, block.mlp_step)
