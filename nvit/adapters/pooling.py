"""Attention pooling with a latent query (SigLIP and others): of its parts, only keys and values read the stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from ..layers import Layout, LinearPart, Prunable, functional
from ..layers.base import dim_slices, index
from ..spec import Slice
from .declare import with_axes


class LatentPool(Prunable):
    """timm's AttentionPoolLatent over a stream of kept channels. What follows its heads keeps the dense width: it works
    on one token an image."""

    pools = True

    def __init__(self, host: AttentionPoolLatent) -> None:
        super().__init__()
        self.adopt(host)
        self.heads, self.scale, self.pool = host.num_heads, host.scale, host.pool
        self.latent_len, self.out_features = host.latent_len, host.out_features
        for name in ("q", "q_norm", "k_norm", "proj", "proj_drop", "norm", "mlp"):
            setattr(self, name, getattr(host, name))
        self.pos_embed = host.pos_embed
        self._index("emb", None)

    def linears(self) -> list[LinearPart]:
        return [LinearPart("kv", self.kv, "in", None, self.emb)]

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._index("emb", index(keeps["emb"]) if self.axes else None)

    def slices(self) -> Iterator[tuple[str, Slice]]:
        if not self.axes:
            return
        emb = Layout.of("emb", self.kv.weight.shape[1])
        for axis, s in dim_slices("kv.weight", tuple(self.kv.weight.shape), 1, emb):
            yield axis, replace(s, published=True)
        if self.pos_embed is not None:
            yield from dim_slices("pos_embed", tuple(self.pos_embed.shape), 1, emb)

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + functional.take(self.pos_embed, None, self.emb)
        q = self.q(self.latent.expand(x.shape[0], -1, -1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        (keys_and_values,) = self.linears()
        kv = keys_and_values.project()(x).unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, scale=self.scale)
        x = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        return x[:, 0] if self.pool == "token" else x.mean(1) if self.pool == "avg" else x


def pool_refusal(pool: nn.Module | None) -> str | None:
    """Why a model's pooling has no prunable form, or None."""
    if pool is None or type(pool) in (AttentionPoolLatent, LatentPool):
        return None
    return f"attention pooling type {type(pool).__name__}"


def latent_pool(host: AttentionPoolLatent, axes: Mapping[str, str]) -> Prunable:
    """The prunable form of timm's latent attention pooling."""
    return with_axes(axes, LatentPool(host), host)


def pool_macs(pool: nn.Module, tokens: int) -> tuple[int, int]:
    """Multiply-accumulates of pooling an image of so many tokens: per channel of the stream, and beyond."""
    width = pool.kv.weight.shape[0]
    after = [m for m in (pool.q, pool.proj) if isinstance(m, nn.Linear)]
    after += [m for m in (pool.mlp.modules() if pool.mlp is not None else ()) if isinstance(m, nn.Linear)]
    fixed = pool.latent_len * (tokens * width + sum(m.weight.numel() for m in after))
    return tokens * width, fixed
