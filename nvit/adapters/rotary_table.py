"""DINOv3's rotary table, made once: timm makes it on the CPU and sends it to the device in every forward pass. A GPU's
host waits for that, and no CUDA graph can hold it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from torch import Tensor


class RotaryTable(RotaryEmbeddingDinoV3):
    """timm's rotary embedding; makes its table anew where images have another size, or it another device or dtype."""

    def _create_embed(self, feat_shape: Sequence[int], no_aug: bool = False) -> Tensor:
        if torch.compiler.is_compiling() or (self.training and self.aug_active and not no_aug):
            return super()._create_embed(feat_shape, no_aug)
        table, made_for = self.__dict__.get("kept", (None, None))
        now = tuple(feat_shape), self.periods.device, self.periods.dtype
        if made_for != now:
            with torch.inference_mode(False), torch.no_grad():  # it outlives the pass that makes it
                table = super()._create_embed(feat_shape, no_aug)
            self.__dict__["kept"] = table, now
        return table


def keep_table_(rope: RotaryEmbeddingDinoV3) -> None:
    """Let a model's rotary embedding keep its table, in place."""
    rope.__class__ = RotaryTable
