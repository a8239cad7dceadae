"""timm's pre-norm Block with a merge of tokens between attention and MLP; parameters and their names stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..layers.merging import Merged, MergingStack, alone, merge


class MergingBlock(Block):
    """A Block that becomes this class in place, so that hooks and wrappers stay.

    Attributes:
        merges: so many tokens merge here.
        prefix: so many at the front never do.
    """

    merges: int
    prefix: int

    def forward(
        self, x: Tensor, merged: Merged | None = None, **more: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if merged is None or more:
            raise alone()
        x, merged = self.attention_step(x, merged)
        return (self.mlp_step(x), *merged)

    def attention_step(self, x: Tensor, merged: Merged) -> tuple[Tensor, Merged]:
        out, keys = self.attn(self.norm1(x), sizes=merged[0], with_keys=True)
        return merge(x + self.drop_path1(self.ls1(out)), keys, merged, self.merges, self.prefix)

    def mlp_step(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def merging_(block: Block, r: int, prefix: int) -> None:
    """Let one block merge `r` tokens, in place."""
    block.__class__ = MergingBlock
    block.merges, block.prefix = int(r), prefix


def merge_blocks_(stack: nn.Sequential, merges: Sequence[int], prefix: int) -> None:
    """Let a prepared model's blocks merge so many tokens each, in place; where all are 0 they are timm's own again."""
    some = any(merges)
    stack.__class__ = MergingStack if some else nn.Sequential
    for block, r in zip(stack, merges, strict=True):
        if some:
            merging_(block, r, prefix)
        elif isinstance(block, MergingBlock):
            block.__class__ = Block
            del block.merges, block.prefix
