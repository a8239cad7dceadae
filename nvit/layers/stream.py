"""Layers along the residual stream: its entry, norms, LayerScale, and linear layers that read or write it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from ..spec import Slice
from . import functional
from .base import Layout, Prunable, dim_slices, index
from .sites import LinearPart, Site


class StreamEntry(Prunable):
    """Where the host's tokens enter the residual stream: pruned channels are left behind. Has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._index("emb", None)

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._index("emb", index(keeps["emb"]))

    def slices(self) -> Iterator[tuple[str, Slice]]:
        yield from ()

    def forward(self, x: Tensor) -> Tensor:
        return functional.enter_stream(x, self.emb)


class Norm(Prunable):
    """LayerNorm or RMSNorm over kept channels: its statistics count them alone.

    Args:
        layout: what its channels are made of: the stream, query dims, all heads' outputs, hidden units.
        bias: None where there is none.
        rms: no mean is taken off.
        entry: the stream is entered through it: its input is dense, and as it writes the stream and reads none of it,
            no gate sits behind it.
        scored: the gate of its units sits behind it; so it does wherever the norm reads the stream.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        eps: float,
        *,
        layout: Layout | None = None,
        rms: bool = False,
        entry: bool = False,
        scored: bool | None = None,
    ) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.layout = layout or Layout.of("emb", weight.numel())
        self.eps, self.rms, self.entry = eps, rms, entry
        self.reads_stream = "emb" in self.layout.axes and not entry
        self.scored = self.reads_stream if scored is None else scored
        self._index("kept", None)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}{', rms' if self.rms else ''}"

    def sites(self) -> dict[str, Site]:
        return super().sites() | ({"emb": Site({"emb": -1})} if self.reads_stream else {})

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._index("kept", index(self.layout.keep(keeps)))

    def resize_(self, keeps: Mapping[str, Tensor]) -> None:
        super().resize_(keeps)
        self.layout = self.layout.resized(keeps)

    def slices(self) -> Iterator[tuple[str, Slice]]:
        for name, p in self.named_parameters(recurse=False):
            for axis, s in dim_slices(name, tuple(p.shape), 0, self.layout):
                yield axis, replace(s, scored=self.scored)

    def forward(self, x: Tensor) -> Tensor:
        if self.entry:
            x = functional.enter_stream(x, self.kept)
        y = self._norm(x)
        if self._watch() is None:
            return y
        if len(self.layout.sizes) == 1:
            return self.watched("emb", y, (self._norm, x))
        neighbours = self.layout.sizes[0]
        return self.watched("emb", y.unflatten(-1, (neighbours, -1))).flatten(-2)

    def _norm(self, x: Tensor) -> Tensor:
        return functional.kept_norm(x, self.weight, self.bias, self.kept, self.eps, rms=self.rms)


class EmbeddingNorm(Norm):
    """A norm of the patch embedding, before position embeddings are added and the stream is entered: statistics over
    kept channels, its output dense, zero where channels are pruned."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, eps: float, **more) -> None:
        super().__init__(weight, bias, eps, entry=True, **more)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.kept is None else y.new_zeros(x.shape).index_copy_(-1, self.kept, y)


class LayerScale(Prunable):
    """The stream's channels times a parameter `(emb,)`, kept under the host's name for it."""

    def __init__(self, gamma: nn.Parameter, name: str = "gamma") -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, gamma)
        self._index("emb", None)

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._index("emb", index(keeps["emb"]))

    def slices(self) -> Iterator[tuple[str, Slice]]:
        gamma = getattr(self, self.name)
        yield from dim_slices(self.name, tuple(gamma.shape), 0, Layout.of("emb", gamma.numel()))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_scale(x, getattr(self, self.name), self.emb)


class Linear(Prunable, nn.Linear):
    """A linear layer between widths: a classifier reads the stream, patch merging reads one stream and writes the next.

    Args:
        host: its weight `(out, in)` and bias are taken over.
        inputs, outputs: layouts of both sides; None for a side that stays.
        reads_stream: no norm stands before it, so that the gate of a stream's unit sits on its inputs.
    """

    def __init__(
        self,
        host: nn.Linear,
        inputs: Layout | None = None,
        outputs: Layout | None = None,
        *,
        reads_stream: bool = False,
    ) -> None:
        super().__init__()
        self.adopt(host)
        self.register_parameter("bias", host.bias)
        self.in_features, self.out_features = host.in_features, host.out_features
        self.inputs, self.outputs, self.reads_stream = inputs, outputs, reads_stream
        self.reads_only = outputs is None
        for name in ("rows", "cols"):
            self._index(name, None)

    def release_(self) -> None:
        super().release_()
        self.inputs, self.reads_stream = None, False

    def sites(self) -> dict[str, Site]:
        return super().sites() | ({"emb": Site({"emb": -1})} if self.reads_stream else {})

    def linears(self) -> list[LinearPart]:
        return [LinearPart("", self, "in", self.rows, self.cols)]

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._index("rows", None if self.outputs is None else index(self.outputs.keep(keeps)))
        self._index("cols", None if self.inputs is None else index(self.inputs.keep(keeps)))

    def resize_(self, keeps: Mapping[str, Tensor]) -> None:
        super().resize_(keeps)
        self.inputs, self.outputs = (s if s is None else s.resized(keeps) for s in (self.inputs, self.outputs))

    def slices(self) -> Iterator[tuple[str, Slice]]:
        if self.inputs is not None:
            for axis, s in dim_slices("weight", tuple(self.weight.shape), 1, self.inputs):
                yield axis, replace(s, scored=self.reads_stream)
        if self.outputs is not None:
            for name, p in self.named_parameters():
                for axis, s in dim_slices(name, tuple(p.shape), 0, self.outputs):
                    yield axis, replace(s, published=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.watched("emb", x)
        return functional.linear(x, self.weight, self.bias, self.rows, self.cols)


class RestoringNorm(Norm):
    """The last norm of a stream, and behind it `restore`, a linear layer from the kept channels to a width that stays.

    Args:
        host: a norm over the stream, dense; its parameters are taken over.
        width: of the output. The layer begins as the identity.
    """

    def __init__(self, host: Norm, width: int) -> None:
        super().__init__(host.weight, host.bias, host.eps, layout=host.layout, rms=host.rms, scored=host.scored)
        linear = nn.Linear(len(host.layout), width).to(host.weight)
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.axes = dict(host.axes)
        self.restore = Linear(linear, inputs=host.layout)
        self.restore.axes = dict(host.axes)
        self.train(host.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.restore(super().forward(x))
