"""Attention and MLPs that have left whole: a constant stays, the bias of the layer that wrote the stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..spec import Slice
from . import functional
from .base import Layout, Prunable, dim_slices, index


class Absent(Prunable):
    """What stands at the place of an attention or MLP without units: it adds a bias to the stream, if there is one.

    Args:
        last: the host's name of the layer that wrote the stream; the bias stays under it.
        bias: `(emb,)`; None where that layer had none, and nothing is added.
    """

    def __init__(self, last: str, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.last_name = last
        self.add_module(last, nn.Module())
        self.get_submodule(last).register_parameter("bias", bias)
        self._index("emb", None)

    @property
    def bias(self) -> Tensor | None:
        return self.get_submodule(self.last_name).bias

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._index("emb", index(keeps["emb"]))

    def slices(self) -> Iterator[tuple[str, Slice]]:
        if self.bias is not None:
            for axis, s in dim_slices(
                f"{self.last_name}.bias", tuple(self.bias.shape), 0, Layout.of("emb", len(self.bias))
            ):
                yield axis, replace(s, published=True)

    def forward(self, x: Tensor, *_: Any, with_keys: bool = False, **__: Any) -> Tensor | tuple[Tensor, None]:
        """The same at every token of `(batch, tokens, kept emb)`. What else the layer was called with counts no more;
        `with_keys`: there are none."""
        out = constant(x, self.bias, self.emb)
        return (out, None) if with_keys else out


def constant(x: Tensor, bias: Tensor | None, kept: Tensor | None) -> Tensor:
    """The kept part of a bias at every place of `x` `(..., kept emb)`, or zeros; no memory of its own."""
    if bias is None:
        return x.new_zeros(1).expand(x.shape)
    return functional.take(bias, kept).expand(x.shape)
