"""timm's Beit: BEiT and BEiT v2, with relative position bias in every block or one for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import SwiGLU, resize_rel_pos_bias_table
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit, Block, gen_relative_position_index
from torch import Tensor, nn

from ..layers import Attention, Prunable, StreamEntry
from ..spec import Part, ViTSpec
from .declare import EMB, fill_buffers_, with_axes
from .scaled_block import ScaledBlock, scaled_block
from .timm_config import mlp_ratio, norm_layer
from .timm_layers import block_refusal, is_norm
from .timm_plain import TimmPlain, embedding_config, norm_config, prepare_heads, prepare_output


class BiasedAttention(Attention):
    """Attention that takes the position bias that all blocks share as timm's blocks pass it.

    Attributes:
        window_size: patches along height and width that its own table of biases is for; None without one.
    """

    window_size: tuple[int, int] | None = None

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """`shared_rel_pos_bias`: `(dense heads, tokens, tokens)`."""
        if shared_rel_pos_bias is None:
            return self.attend(x)
        bias = shared_rel_pos_bias if self.table_heads is None else shared_rel_pos_bias[self.table_heads]
        return self.attend(x, bias.unsqueeze(0))

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Called by the model's `set_input_size`: the table of the kept heads is resampled as timm's is."""
        if self.bias_table_name is None or tuple(window_size) == self.window_size:
            return
        table, height, width = self.relative_position_bias_table, *window_size
        shape = ((2 * height - 1) * (2 * width - 1) + 3, table.shape[1])
        with torch.no_grad():
            resized = resize_rel_pos_bias_table(table, window_size, shape, self.window_size)
        self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        self._constant("bias_index", gen_relative_position_index(window_size).to(table.device))
        self.window_size = tuple(window_size)


class TimmBeit(TimmPlain):
    """The adapter of timm's Beit.

    A head takes its column of the block's position bias with it; a bias that all blocks share stays whole.
    """

    family = "timm_beit"
    architectures: ClassVar = {"Beit": Beit}

    def merge_refusal(self, model: nn.Module) -> str | None:
        return "its attention has a bias for every two places, and a merged token has several"

    def block_refusal(self, block: nn.Module) -> str | None:
        if not isinstance(block, ScaledBlock):
            if type(block) is not Block:
                return f"block type {type(block).__name__}"
            if type(block.attn) is not BeitAttention:
                return f"attention type {type(block.attn).__name__}"
        return block_refusal(block)

    def prepare(self, model: nn.Module) -> nn.Module:
        if hasattr(model, "dense_config"):
            return prepare_heads(model)
        model.dense_config = _config(model)
        model.pos_drop = nn.Sequential(model.pos_drop, with_axes(EMB, StreamEntry(), model.pos_drop))
        for i, block in enumerate(model.blocks):
            model.blocks[i] = scaled_block(block, i, partial(_attention, shared_bias=model.rel_pos_bias is not None))
        prepare_output(model)
        return model

    def settings(self, model: nn.Module) -> dict[str, Any]:
        return super().settings(model) | {"use_fc_norm": is_norm(model.fc_norm)}

    def build(self, spec: ViTSpec, device: str = "meta") -> nn.Module:
        config = dict(spec.config)
        config["norm_layer"] = norm_layer(config)
        model = self.construct(spec, config, device)
        if model.rel_pos_bias is not None:
            fill_buffers_(model.rel_pos_bias)
        return self.prepare(model)

    def steps(self, model: nn.Module, part: Part) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        block = model.blocks[0]
        shared = None if model.rel_pos_bias is None else model.rel_pos_bias()
        return partial(block.attention_step, shared_rel_pos_bias=shared), block.mlp_step


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
    layer.window_size = tuple(host.window_size) if own_bias else None
    return with_axes(axes, layer, host)


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
        **norm_config(model),
    }
