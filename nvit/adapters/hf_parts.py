"""Pieces of transformers' models that have no like elsewhere: attention as their blocks call it, entries into the
stream, SigLIP's pooling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Absent, Attention, Prunable, StreamEntry
from ..layers.base import index
from ..layers.functional import Rotary
from ..spec import Slice
from .declare import EMB, norm, with_axes


class TransformersAbsent(Absent):
    """An attention that has left, with the two outputs that transformers' blocks expect."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return super().forward(hidden_states), None


class TransformersAttention(Attention):
    """Called as transformers' blocks call theirs: the second output is for attention weights, which nobody computes."""

    def absent(self, bias: nn.Parameter | None) -> Absent:
        return TransformersAbsent(self.last_name, bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """`position_embeddings`: cosines and sines of the patches, `(patches, 2·pairs)` each."""
        if output_attentions:
            raise ValueError("a prunable model computes no attention weights; leave out output_attentions")
        turn = None
        if position_embeddings is not None:
            cos, sin = position_embeddings
            turn = Rotary(sin, cos, prefix=hidden_states.shape[1] - sin.shape[-2])
        return self.attend(hidden_states, attention_mask, turn), None


@lru_cache
def _entering(host: type[nn.Module]) -> type[nn.Module]:
    """The class of embeddings whose tokens leave them through a `StreamEntry`, their child `entry`."""

    def forward(self, *args: Any, **more: Any) -> Tensor:
        return self.entry(host.forward(self, *args, **more))

    return type(host.__name__, (host,), {"forward": forward})


def enter_stream_(base: nn.Module, where: str) -> None:
    """Let the tokens enter the residual stream behind a dropout or the embeddings, or through a norm, in place."""
    module = base.get_submodule(where)
    if isinstance(module, nn.LayerNorm):
        base.set_submodule(where, norm(module, EMB, entry=True))
    elif isinstance(module, nn.Dropout):
        base.set_submodule(where, nn.Sequential(module, with_axes(EMB, StreamEntry(), module)))
    else:
        module.__class__ = _entering(type(module))
        module.entry = with_axes(EMB, StreamEntry(), module)


class ProbePool(Prunable):
    """SigLIP's pooling head over a stream of kept channels. Queries, keys and values come from one matrix, of which the
    queries read a probe of the dense width: so the kept channels are spread to their places in the dense stream, which
    costs one pass over the tokens, and the head itself stays dense.

    Attributes:
        places: the dense model's channels that are left.
    """

    pools = True

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.adopt(host)
        self.width = self.probe.shape[-1]
        self.places = {"emb": tuple(range(self.width))}
        self._constant("spread", None)

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._spread(self._left(keeps))

    def keep_all_(self) -> None:
        super().keep_all_()
        self._spread(self.places.get("emb", range(self.width)))

    def resize_(self, keeps: Mapping[str, Tensor]) -> None:
        self.places = {axis: self._left(keeps) for axis in self.places}
        super().resize_(keeps)

    def _left(self, keeps: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The dense model's channels that these masks leave; all where it reads a restored width."""
        if not self.places:
            return tuple(range(self.width))
        return tuple(unit for unit, kept in zip(self.places["emb"], keeps["emb"].tolist(), strict=True) if kept)

    def _spread(self, units: Sequence[int]) -> None:
        keep = torch.zeros(self.width, dtype=torch.bool)
        keep[list(units)] = True
        at = index(keep)
        self._constant("spread", at if at is None else at.to(self.probe.device))

    def slices(self) -> Iterator[tuple[str, Slice]]:
        yield from ()

    def forward(self, hidden_state: Tensor) -> Tensor:
        x = hidden_state
        if self.spread is not None:
            x = x.new_zeros(*x.shape[:-1], self.width).index_copy(-1, self.spread, x)
        pooled = self.attention(self.probe.repeat(len(x), 1, 1), x, x)[0]
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


def probe_macs(pool: ProbePool, tokens: int) -> int:
    """Multiply-accumulates of pooling an image of so many tokens."""
    width = pool.width
    once = sum(m.weight.numel() for m in (pool.attention.out_proj, pool.mlp.fc1, pool.mlp.fc2)) + width * width
    return once + tokens * 2 * width * (width + 1)
