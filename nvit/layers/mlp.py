"""MLPs with a prunable hidden width: plain and gated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..spec import Slice
from . import functional
from .absent import Absent, constant
from .base import Layout, Prunable, dim_slices, index
from .sites import LinearPart, Site
from .stream import Norm


class _Hidden(Prunable):
    """Layers to a hidden width and one back to the stream, under the host's names."""

    def __init__(
        self, host: nn.Module, first: Sequence[str], last: str, act: nn.Module, drop: float, norm: Norm | None
    ) -> None:
        super().__init__()
        self.adopt(host)
        self.first_names, self.last_name = tuple(first), last
        self.act, self.drop, self.norm = act, nn.Dropout(drop), norm
        for name in ("emb", "first_rows", "hidden"):
            self._index(name, None)

    @property
    def first(self) -> list[nn.Linear]:
        return [self.get_submodule(name) for name in self.first_names]

    @property
    def last(self) -> nn.Linear:
        return self.get_submodule(self.last_name)

    def _rows(self, layer: nn.Linear) -> Layout:
        """Packed, a hidden unit has a row in each half: its gate's and its value's."""
        width, rows = self.last.weight.shape[1], layer.weight.shape[0]
        return Layout.of("mlp", width) if rows == width else Layout((None, "mlp"), (rows // width, width))

    def sites(self) -> dict[str, Site]:
        return super().sites() | {"out": Site({"mlp": -1})}

    def linears(self) -> list[LinearPart]:
        names = zip(self.first_names, self.first, strict=True)
        read = [LinearPart(name, layer, "in", self.first_rows, self.emb) for name, layer in names]
        return [*read, LinearPart(self.last_name, self.last, "out", self.emb, self.hidden)]

    def reorderable(self) -> tuple[LinearPart, str, int | None]:
        return self.linears()[-1], "mlp", None

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._index("emb", index(keeps["emb"]))
        self._index("first_rows", index(self._rows(self.first[0]).keep(keeps)))
        self._index("hidden", index(keeps["mlp"]))

    def ended(self, keeps: Mapping[str, Tensor]) -> bool:
        return not bool(keeps["mlp"].any())

    def absent(self, bias: nn.Parameter | None) -> Absent:
        """What stands here without hidden units."""
        return Absent(self.last_name, bias)

    def _constant_out(self, x: Tensor) -> Tensor | None:
        """The output where no hidden unit is kept; None where some are."""
        if self.hidden is None or len(self.hidden):
            return None
        self.watched("out", x.new_zeros(*x.shape[:-1], 0))
        return constant(x, self.last.bias, self.emb)

    def slices(self) -> Iterator[tuple[str, Slice]]:
        for name, layer in zip(self.first_names, self.first, strict=True):
            emb = Layout.of("emb", layer.weight.shape[1])
            for axis, s in dim_slices(f"{name}.weight", tuple(layer.weight.shape), 1, emb):
                yield axis, replace(s, published=True)
            for leaf, p in layer.named_parameters():
                for axis, s in dim_slices(f"{name}.{leaf}", tuple(p.shape), 0, self._rows(layer)):
                    yield axis, replace(s, published=True)
        emb, hidden = self.last.weight.shape
        for axis, s in dim_slices(f"{self.last_name}.weight", (emb, hidden), 1, Layout.of("mlp", hidden)):
            yield axis, replace(s, scored=True)
        for leaf, p in self.last.named_parameters():
            for axis, s in dim_slices(f"{self.last_name}.{leaf}", tuple(p.shape), 0, Layout.of("emb", emb)):
                yield axis, replace(s, published=True)


class Mlp(_Hidden):
    """fc1, activation, fc2 with a prunable hidden width.

    Args:
        host: its linear layers are taken over.
        first, last: their names there.
        norm: of the hidden units, before the last layer; the gate sits behind it.
    """

    def __init__(
        self,
        host: nn.Module,
        act: nn.Module,
        *,
        first: str = "fc1",
        last: str = "fc2",
        drop: float = 0.0,
        norm: Norm | None = None,
    ) -> None:
        super().__init__(host, (first,), last, act, drop, norm)

    def forward(self, x: Tensor) -> Tensor:
        if (out := self._constant_out(x)) is not None:
            return out
        fc1, fc2 = self.linears()
        out = functional.mlp(
            x,
            fc1.project(),
            fc2.project(),
            self.act,
            norm=self.norm,
            dropout=self.drop.p if self.training else 0.0,
            watch=self._watch(),
        )
        return self.drop(out)


class GatedMlp(_Hidden):
    """last(act(gate) * value) with a prunable hidden width, as SwiGLU.

    Args:
        first: names of the gate's and the value's layer, or of one that packs both.
        gate_last: the value comes before the gate.
    """

    def __init__(
        self,
        host: nn.Module,
        act: nn.Module,
        *,
        first: Sequence[str],
        last: str = "fc2",
        drop: float = 0.0,
        gate_last: bool = False,
        norm: Norm | None = None,
    ) -> None:
        super().__init__(host, first, last, act, drop, norm)
        self.gate_last = gate_last

    def forward(self, x: Tensor) -> Tensor:
        if (out := self._constant_out(x)) is not None:
            return out
        *first, last = self.linears()
        out = functional.gated_mlp(
            x,
            [part.project() for part in first],
            last.project(),
            self.act,
            gate_last=self.gate_last,
            norm=self.norm,
            dropout=self.drop.p if self.training else 0.0,
            watch=self._watch(),
        )
        return self.drop(out)
