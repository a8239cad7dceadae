"""Multi-head self-attention whose heads, query/key and value widths are prunable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import Slice
from . import functional
from .absent import Absent, constant
from .base import Layout, Prunable, dim_slices, index
from .functional import Rotary
from .sites import Basis, LinearPart, Site
from .stream import Norm

PARTS = ("q", "k", "v")


def head_layout(qk_dim: int, pairs: str | None = None) -> Layout:
    """Of the query/key dims of one head of `qk_dim` units, see `Attention` for `pairs`."""
    if pairs is None:
        return Layout.of("qk_dim", qk_dim)
    return Layout(("qk_dim", None), (qk_dim, 2)) if pairs == "interleaved" else Layout((None, "qk_dim"), (2, qk_dim))


class Attention(Prunable):
    """Self-attention; its parameters keep the host's names.

    Queries, keys and values come from one fused linear layer or from three. Its rows are head by head.

    Args:
        host: its parameters and linear layers are taken over.
        heads, qk_dim, v_dim: dense widths; with `pairs`, `qk_dim` counts rotary pairs.
        scale: of the logits.
        inputs: names of the layer that gives queries, keys and values, or of the three that do.
        biases: names of the host's own bias vectors of queries, keys and values, None for one that is zero; where not
            given, the linear layers have theirs.
        proj: name of the layer that writes the stream.
        gate: name of a layer whose sigmoid multiplies the heads' outputs.
        q_norm, k_norm: of queries and keys; `norm`, of all heads' outputs together.
        pairs: how a rotary pair lies among a head's dims: `interleaved` (neighbours) or `half` (half the head apart).
        bias_table: name of a parameter `(offsets, heads)` whose rows `bias_index` `(tokens, tokens)` looks up.
        shared_heads: the heads of all blocks read one table of the host's, which keeps its dense width: it gives the
            angles or the position bias of every head.

    Attributes:
        places: axis -> the dense model's units that are left, of the axes where it matters which: rotary pairs turn by
            frequencies of their own, and so do heads that read a shared table.
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        heads: int,
        qk_dim: int,
        v_dim: int,
        scale: float,
        inputs: Sequence[str] = ("qkv",),
        biases: Sequence[str | None] | None = None,
        proj: str = "proj",
        gate: str | None = None,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        norm: Norm | None = None,
        pairs: str | None = None,
        bias_table: str | None = None,
        bias_index: Tensor | None = None,
        shared_heads: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.adopt(host)
        self.heads, self.qk_dim, self.v_dim, self.scale = heads, qk_dim, v_dim, scale
        self.input_names, self.bias_names, self.last_name, self.gate_name = tuple(inputs), biases, proj, gate
        self.q_norm, self.k_norm, self.norm = q_norm, k_norm, norm
        self.pairs, self.bias_table_name = pairs, bias_table
        self.attn_drop, self.proj_drop = attn_drop, nn.Dropout(proj_drop)
        self.kept = (heads, qk_dim, v_dim)
        placed = {"qk_dim": qk_dim} if pairs else {}
        placed |= {"heads": heads} if shared_heads else {}
        self.dense_sizes = placed  # of the host's tables; pruning does not change them
        self.places = {axis: tuple(range(n)) for axis, n in placed.items()}
        self._constant("bias_index", bias_index)
        for name in ("emb", "q_rows", "v_rows", "out", "kept_heads"):
            self._index(name, None)
        for name in ("table_dims", "table_heads"):
            self._constant(name, None)

    @property
    def inputs(self) -> list[nn.Linear]:
        return [self.get_submodule(name) for name in self.input_names]

    @property
    def last(self) -> nn.Linear:
        return self.get_submodule(self.last_name)

    def span(self, axis: str) -> int:
        return 2 if axis == "qk_dim" and self.pairs else 1

    def layout(self, part: str) -> Layout:
        """Of the rows of `q`, `k` or `v`; the latter is that of the columns of the last layer as well."""
        if part == "v":
            return Layout(("heads", "v_dim"), (self.heads, self.v_dim))
        head = head_layout(self.qk_dim, self.pairs)
        return Layout(("heads", *head.axes), (self.heads, *head.sizes))

    def extra_repr(self) -> str:
        return "heads={}, qk_dim={}, v_dim={}".format(*self.kept)

    def sites(self) -> dict[str, Site]:
        queries = {
            None: Site({"qk_dim": -1}, (-3, -1)),
            "half": Site({"qk_dim": -1}, (-4, -2, -1)),
            "interleaved": Site({"qk_dim": -2}, (-4, -1, -2)),
        }
        out = Site({"heads": -2, "v_dim": -1}, (-2, -1))
        return super().sites() | {"qk": queries[self.pairs], "maps": Site(), "out": out}

    def linears(self) -> list[LinearPart]:
        rows = (self.q_rows, self.q_rows, self.v_rows)
        read = [
            LinearPart(name, layer, "in", kept, self.emb)
            for name, layer, kept in zip(self.input_names, self.inputs, rows, strict=False)
        ]
        if self.gate_name is not None:
            read.append(LinearPart(self.gate_name, self.get_submodule(self.gate_name), "gate", self.v_rows, self.emb))
        return [*read, LinearPart(self.last_name, self.last, "out", self.emb, self.out)]

    def bases(self) -> list[Basis]:
        keys, values = None, None
        if self.pairs is not None:
            keys = "rotary position embedding"
        elif self.q_norm is not None or self.k_norm is not None:
            keys = "a norm on queries"
        if self.norm is not None:
            values = "a norm on the heads' outputs"
        elif self.gate_name is not None:
            values = "a gate on the heads' outputs"
        return [
            Basis("qk_dim", "qk", self.heads, self.qk_dim, keys, constant=False),
            Basis("v_dim", "out", self.heads, self.v_dim, values, constant=self.last.bias is not None),
        ]

    @torch.no_grad()
    def turn_(self, axis: str, turn: Tensor, inverse: Tensor) -> None:
        """Give the dims of every head of a dense layer another basis, in place; what the layer computes stays.

        Args:
            turn, inverse: `(heads, dims, dims)`, fp64: `q -> turn q` and `k -> inverseᵀ k`, or `v -> turn v`.
        """
        if axis == "qk_dim":
            self._turn_rows_("q", turn)
            self._turn_rows_("k", inverse.mT)
            return
        self._turn_rows_("v", turn)
        w = self.last.weight
        heads = w.double().unflatten(1, inverse.shape[:2])
        w.copy_(torch.einsum("ohd,hde->ohe", heads, inverse).flatten(1))

    def _turn_rows_(self, part: str, turn: Tensor) -> None:
        for _, tensor, rows in self.rows_of(part):
            span = tensor.data if rows is None else tensor.data[rows[0] : rows[1]]
            turned = torch.einsum("hde,he...->hd...", turn, span.double().unflatten(0, turn.shape[:2]))
            span.copy_(turned.flatten(0, 1))

    def reorderable(self) -> tuple[LinearPart, str, int | None]:
        return self.linears()[-1], "v_dim", self.v_dim

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self.kept = tuple(int(keeps[kind].sum()) for kind in ("heads", "qk_dim", "v_dim"))
        q, v = (self.layout(part).keep(keeps) for part in ("q", "v"))
        self._index("emb", index(keeps["emb"]))
        self._index("out", index(v))
        self._index("kept_heads", index(keeps["heads"]))
        self._index("q_rows", index(torch.cat([q, q, v]) if len(self.input_names) == 1 else q))
        self._index("v_rows", index(v))
        self._place(keeps)

    def ended(self, keeps: Mapping[str, Tensor]) -> bool:
        return not bool(keeps["heads"].any())

    def absent(self, bias: nn.Parameter | None) -> Absent:
        """What stands here without heads."""
        return Absent(self.last_name, bias)

    def keep_all_(self) -> None:
        super().keep_all_()
        self.kept = (self.heads, self.qk_dim, self.v_dim)
        self._place({axis: torch.ones(len(units), dtype=torch.bool) for axis, units in self.places.items()})

    def resize_(self, keeps: Mapping[str, Tensor]) -> None:
        self.heads, self.qk_dim, self.v_dim = (int(keeps[kind].sum()) for kind in ("heads", "qk_dim", "v_dim"))
        self.places = {axis: self._left(axis, keeps) for axis in self.places}
        super().resize_(keeps)

    def _left(self, axis: str, keeps: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The dense model's units of an axis that these masks leave."""
        return tuple(unit for unit, kept in zip(self.places[axis], keeps[axis].tolist(), strict=True) if kept)

    def _place(self, keeps: Mapping[str, Tensor]) -> None:
        """Where in the host's tables the kept rotary dims and heads are found."""
        every = {axis: torch.zeros(n, dtype=torch.bool) for axis, n in self.dense_sizes.items()}
        for axis, mask in every.items():
            mask[list(self._left(axis, keeps))] = True
        dims = index(head_layout(self.dense_sizes["qk_dim"], self.pairs).keep(every)) if self.pairs else None
        heads = index(every["heads"]) if "heads" in every else None
        device = next(self.parameters()).device
        for name, kept in (("table_dims", dims), ("table_heads", heads)):
            self._constant(name, kept if kept is None else kept.to(device))

    def slices(self) -> Iterator[tuple[str, Slice]]:
        yield from self._input_slices()
        last, columns = self.last_name, self.layout("v")
        weight = tuple(self.last.weight.shape)
        for axis, s in dim_slices(f"{last}.weight", weight, 1, columns):
            yield axis, replace(s, scored=True)
        for leaf, p in self.last.named_parameters():
            for axis, s in dim_slices(f"{last}.{leaf}", tuple(p.shape), 0, Layout.of("emb", weight[0])):
                yield axis, replace(s, published=True)
        if self.gate_name is not None:
            gate = self.get_submodule(self.gate_name)
            yield from dim_slices(
                f"{self.gate_name}.weight", tuple(gate.weight.shape), 1, Layout.of("emb", gate.weight.shape[1])
            )
            for leaf, p in gate.named_parameters():
                yield from dim_slices(f"{self.gate_name}.{leaf}", tuple(p.shape), 0, columns)
        if self.bias_table_name is not None:
            table = getattr(self, self.bias_table_name)
            yield from dim_slices(self.bias_table_name, tuple(table.shape), 1, Layout.of("heads", self.heads))

    def _input_slices(self) -> Iterator[tuple[str, Slice]]:
        for name, layer in zip(self.input_names, self.inputs, strict=True):
            emb = Layout.of("emb", layer.weight.shape[1])
            for axis, s in dim_slices(f"{name}.weight", tuple(layer.weight.shape), 1, emb):
                yield axis, replace(s, published=True)
        for part in PARTS:
            layout = self.layout(part)
            for name, tensor, rows in self.rows_of(part):
                shape = (len(layout), *tensor.shape[1:])
                for axis, s in dim_slices(name, shape, 0, layout, rows):
                    # A qk_dim unit's gate sits on the queries that meet the keys: behind their norm, if any.
                    gate = part == "q" and axis == "qk_dim" and self.q_norm is None
                    yield axis, replace(s, scored=gate, published=part != "k" or axis == "heads")

    def rows_of(self, part: str) -> Iterator[tuple[str, Tensor, tuple[int, int] | None]]:
        """`(name, parameter, rows)` of the weight and the bias that give one of `q`, `k`, `v`."""
        place = PARTS.index(part)
        fused = len(self.input_names) == 1
        start = sum(len(self.layout(p)) for p in PARTS[:place])
        rows = (start, start + len(self.layout(part))) if fused else None
        name, layer = (self.input_names[0], self.inputs[0]) if fused else (self.input_names[place], self.inputs[place])
        yield f"{name}.weight", layer.weight, rows
        if self.bias_names is not None:
            if self.bias_names[place] is not None:
                yield self.bias_names[place], getattr(self, self.bias_names[place]), None
        elif layer.bias is not None:
            yield f"{name}.bias", layer.bias, rows

    def _bias(self) -> Tensor | None:
        """The bias of the fused layer from the host's own vectors; None where the layers have theirs."""
        if self.bias_names is None:
            return None
        own = [name and getattr(self, name) for name in self.bias_names]
        zero = next(vector for vector in own if vector is not None).new_zeros
        lengths = (len(self.layout(part)) for part in PARTS)
        return torch.cat([zero(n) if v is None else v for n, v in zip(lengths, own, strict=True)])

    def position_bias(self) -> Tensor | None:
        """Relative position bias of the kept heads, `(1, heads, tokens, tokens)`, as the fused CPU kernel wants it."""
        if self.bias_table_name is None:
            return None
        table = functional.take(getattr(self, self.bias_table_name), None, self.kept_heads)
        bias = table[self.bias_index.flatten()].view(*self.bias_index.shape, -1)
        return bias.permute(2, 0, 1).contiguous().unsqueeze(0)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Rotary | None = None,
        **merging: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`merging`: `sizes` and `with_keys`, see `attend`."""
        if is_causal:
            raise ValueError("causal attention is not supported in a prunable model; pass attn_mask instead")
        return self.attend(x, attn_mask, rope, **merging)

    def attend(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        rope: Rotary | None = None,
        windows: int = 1,
        sizes: Tensor | None = None,
        with_keys: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over `(batch · windows, tokens, kept emb)`.

        Args:
            attn_mask: additive or boolean, broadcastable to `(batch, heads, tokens, tokens)`, or `(windows, 1, tokens,
                tokens)`, the same for every image. It is added to the position bias.
            rope: the host's rotary table, for layers with `pairs`.
            windows: so many of the batch belong to one image.
            sizes: how many tokens each stands for, see `functional.attention`.
            with_keys: give the keys as well, `(batch, kept heads, tokens, kept qk)`.
        """
        heads, qk_dim, v_dim = self.kept
        watch = self._watch()
        if watch is not None and windows > 1:
            watch = functional.watch_windows(watch, windows)
        bias, (*read, write) = self._bias(), self.linears()
        if not heads:
            self.watched("out", x.new_zeros(*x.shape[:-1], 0, 0))
            out = constant(x, self.last.bias, self.emb)
            return (out, None) if with_keys else out
        out = functional.attention(
            x,
            [part.project(bias) for part in read if part.end == "in"],
            write.project(),
            heads=heads,
            qk_dim=qk_dim * self.span("qk_dim"),
            v_dim=v_dim,
            scale=self.scale,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            norm=self.norm,
            gate=next((part.project() for part in read if part.end == "gate"), None),
            rope=None if rope is None or self.pairs is None else rope.of(self.table_dims, self.table_heads),
            pairs=self.pairs,
            bias=self.position_bias(),
            attn_mask=attn_mask,
            dropout=self.attn_drop if self.training else 0.0,
            sizes=sizes,
            with_keys=with_keys,
            watch=watch,
            maps="maps" in self._watches,
        )
        return (self.proj_drop(out[0]), out[1]) if with_keys else self.proj_drop(out)
