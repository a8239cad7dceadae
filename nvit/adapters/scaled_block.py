"""The blocks of timm's EVA and BEiT: their LayerScales are parameters of the block itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..layers import Layout, Prunable, functional
from ..layers.base import dim_slices, index
from ..spec import Slice
from .declare import EMB, block_axes
from .timm_layers import mlp, stream_norm


class ScaledBlock(Prunable):
    """A pre-norm block; what its attention and its MLP add to the stream is scaled by `gamma_1` and `gamma_2`, if any.

    Args:
        host: its parameters and children are taken over.
        attn, mlp: the prunable forms of the host's.
    """

    def __init__(self, host: nn.Module, attn: Prunable, mlp: Prunable) -> None:
        super().__init__()
        self.adopt(host)
        self.gamma_1, self.gamma_2 = host.gamma_1, host.gamma_2
        self.norm1, self.norm2 = stream_norm(host.norm1), stream_norm(host.norm2)
        self.attn, self.mlp = attn, mlp
        self.drop_path1, self.drop_path2 = host.drop_path1, host.drop_path2
        self._index("emb", None)

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._index("emb", index(keeps["emb"]))

    def slices(self) -> Iterator[tuple[str, Slice]]:
        for name, p in self.named_parameters(recurse=False):
            yield from dim_slices(name, tuple(p.shape), 0, Layout.of("emb", p.numel()))

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        """One block's step along the stream `(batch, tokens, kept emb)`; `attention` is what the host's gets."""
        return self.mlp_step(self.attention_step(x, **attention))

    def attention_step(self, x: Tensor, **attention: Any) -> Tensor:
        return x + self.drop_path1(self._scaled(self.gamma_1, self.attn(self.norm1(x), **attention)))

    def mlp_step(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self._scaled(self.gamma_2, self.mlp(self.norm2(x))))

    def _scaled(self, gamma: Tensor | None, x: Tensor) -> Tensor:
        return x if gamma is None else functional.layer_scale(x, gamma, self.emb)


def scaled_block(host: nn.Module, index: int, attention) -> Prunable:
    """The prunable form of the block at `index`; `attention(host.attn, axes)` gives its attention's."""
    attention_axes, mlp_axes = block_axes(f"blocks.{index}")
    block = ScaledBlock(host, attention(host.attn, attention_axes), mlp(host.mlp, mlp_axes))
    block.axes = dict(EMB)
    return block.train(host.training)
