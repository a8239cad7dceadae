"""Attention pruned without head alignment: query/key and value dims leave the concatenated dims of all heads, one here
and two there, so that heads end up of different widths; for its ablation (arXiv:2110.04869, Sec. 3.1, App. B.3).

While it is pruned, dims that have left are zero in place, which is exact: a zero query dim adds nothing to the logits,
a zero value dim nothing to the output. What comes out is a model of equal heads again, each as wide as the widest of
its block and filled up with zeros, since one batched product is faster than a product a head.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from nvit import adapters
from nvit.adapters.declare import Width, block_widths, collect
from nvit.adapters.timm_vit import TimmViT
from nvit.latency.grid import Grid
from nvit.latency.table import LatencyTable
from nvit.layers import Attention, Layout
from nvit.layers.base import index
from nvit.spec import BUNDLE_SIZES, Group, Part
from nvit.structure.compact import compact
from nvit.structure.masks import Masks, full_masks


class RaggedAttention(Attention):
    """Attention whose dims leave one by one; `qk_dim` and `v_dim` count the dims of all heads together."""

    def layout(self, part: str) -> Layout:
        axis, dims = ("v_dim", self.v_dim) if part == "v" else ("qk_dim", self.qk_dim)
        return Layout.of(axis, self.heads * dims)

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._index("emb", index(keeps["emb"]))


class RaggedTransformer(VisionTransformer):
    """timm's VisionTransformer, as the adapter knows it."""


class RaggedViT(TimmViT):
    """The adapter of ViTs without head alignment, for masking alone; `padded` makes an ordinary model of one."""

    family = "ragged_vit"
    architectures: ClassVar = {"RaggedTransformer": RaggedTransformer}

    def prepare(self, model: nn.Module) -> nn.Module:
        super().prepare(model)
        for block in model.blocks:
            block.attn.__class__ = RaggedAttention
            block.attn.axes.pop("heads", None)
        return model

    def groups(self, model: nn.Module, bundle_sizes: Mapping[str, int] = BUNDLE_SIZES) -> list[Group]:
        """As of the aligned model without heads; a bundle of dims is as many weights as there, `heads` times as many
        units."""
        heads, depth = model.blocks[0].attn.heads, len(model.blocks)
        widths = [Width("emb", "emb", tuple(range(depth)))]
        widths += [w for i in range(depth) for w in block_widths(f"blocks.{i}", i) if w.kind != "heads"]
        sizes = {kind: size * (heads if kind in ("qk_dim", "v_dim") else 1) for kind, size in bundle_sizes.items()}
        return collect(model, widths, {"emb": self.embeddings(model)}, sizes)


adapters.FAMILIES.setdefault(RaggedViT.family, RaggedViT())


def ragged(model: nn.Module) -> nn.Module:
    """A prepared copy of a dense timm ViT that is pruned without head alignment."""
    twin = copy.deepcopy(model)
    twin.__class__ = RaggedTransformer
    return adapters.find(twin).prepare(twin)


def ragged_table(table: LatencyTable, heads: int) -> LatencyTable:
    """The latency table of an aligned model by all heads' dims together, as if they were spread evenly."""
    parts, grids = [], {}
    for part in table.parts:
        grid = table.grids[part.name]
        if "heads" in part.kinds:
            at = part.kinds.index("heads")
            times = [heads if kind in ("qk_dim", "v_dim") else 1 for kind in part.kinds]
            axes = [[times[i] * p for p in points] for i, points in enumerate(grid.axes) if i != at]
            kinds = tuple(k for k in part.kinds if k != "heads")
            grid = Grid(kinds, axes, grid.values.take(-1, axis=at))
            part = Part(part.name, kinds, tuple(piece[:-1] for piece in part.pieces))
        parts.append(part)
        grids[part.name] = grid
    dense = [
        b.__class__(emb=b.emb, heads=0, qk_dim=heads * b.qk_dim, v_dim=heads * b.v_dim, mlp=b.mlp) for b in table.dense
    ]
    return LatencyTable(parts, grids, dense, table.setting)


def padded_masks(groups: Sequence[Group], masks: Masks, heads: int) -> Masks:
    """Masks of the aligned model that `padded` cuts: of every head the widest one's number of dims; a head without
    value dims has left."""
    found = full_masks(groups)
    for g in groups:
        if g.kind in ("emb", "mlp"):
            found[g.name] = masks[g.name].clone()
        elif g.kind == "heads":
            found[g.name] = masks[g.name.replace("heads", "v_dim")].view(heads, -1).any(1)
        else:
            alive = masks[g.name.replace(g.kind, "v_dim")].view(heads, -1).any(1)
            widest = int(masks[g.name].view(heads, -1)[alive].sum(1).max().clamp(min=1))
            found[g.name] = torch.arange(g.size) < widest
    return found


@torch.no_grad()
def padded(model: nn.Module, dense: nn.Module, masks: Masks) -> nn.Module:
    """An ordinary compact model that computes what the masked ragged `model` does.

    Zeros stay zero when it is trained: a pair of zero query and key dims has no gradient, nor has a zero value dim
    whose column of the last layer is zero.

    Args:
        dense: the aligned model, of which only shapes are read.
    """
    twin = copy.deepcopy(dense)
    adapter = adapters.find(twin)
    adapter.prepare(twin).load_state_dict(model.state_dict())
    heads = twin.blocks[0].attn.heads
    for i, block in enumerate(twin.blocks):
        kept_first = {}
        for kind in ("qk_dim", "v_dim"):
            order = (~masks[f"blocks.{i}.{kind}"]).view(heads, -1).int().argsort(dim=1, stable=True)
            kept_first[kind] = (order + order.shape[1] * torch.arange(heads)[:, None]).flatten()
        qk, v = kept_first["qk_dim"], kept_first["v_dim"]
        rows = torch.cat([qk, len(qk) + qk, 2 * len(qk) + v]).to(block.attn.qkv.weight.device)
        for p in block.attn.qkv.parameters():
            p.copy_(p[rows])
        block.attn.proj.weight.copy_(block.attn.proj.weight[:, v.to(rows.device)])
    groups = adapter.groups(twin)
    return compact(twin, groups, padded_masks(groups, masks, heads))
