"""Swin's windows: attention inside them, how many there are, how far they are shifted."""

from __future__ import annotations

import math

from timm.models.swin_transformer import SwinTransformerBlock, get_relative_position_index
from timm.models.swin_transformer import WindowAttention as TimmWindowAttention
from torch import Tensor

from ..layers import Attention


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


def windows_of(block: SwinTransformerBlock) -> int:
    """Windows of an image, padded ones included."""
    return math.prod(math.ceil(r / w) for r, w in zip(block.input_resolution, block.window_size, strict=True))


def shift_of(block: SwinTransformerBlock, place: int) -> tuple[int, ...]:
    """How far timm's constructor shifts the windows of a stage's block: half a window in every other one."""
    sides = zip(block.input_resolution, block.window_size, strict=True)
    return tuple(w // 2 if place % 2 and (block.always_partition or r > w) else 0 for r, w in sides)
