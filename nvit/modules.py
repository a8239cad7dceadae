"""Prunable layers: parameters plus one call into `nvit.functional`. Masked and compact models share them.

Every layer has an `axes` map from the kinds of width it has to the groups that prune them, which an adapter fills in,
and `keep_`, which takes the masks of these groups. Parameter names are the host's, and buffers are not saved: a
masked model's state dict looks like the dense model's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from . import functional


def _index(keep: Tensor | None) -> Tensor | None:
    """Kept positions of a bool vector; None where all are kept, so that a dense layer gathers nothing."""
    return None if keep is None or bool(keep.all()) else keep.nonzero().squeeze(1)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Keep of the concatenated layout from a keep per head and a keep per dim."""
    return (a[:, None] & b[None, :]).flatten()


class Prunable(nn.Module):
    """Base of the layers below.

    Attributes:
        axes: kind of width -> name of the group that prunes it here.
        tap: see `nvit.functional`; set while gate gradients are read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.axes: dict[str, str] = {}
        self.tap: functional.Tap | None = None

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        """Restrict the forward pass to kept units; `keeps[kind]` is a bool vector over the dense width."""
        raise AssertionError(f"{type(self).__name__} does not say what it keeps")

    def keep_all_(self) -> None:
        """Forget all masks: every index becomes None."""
        for name in self._non_persistent_buffers_set:
            setattr(self, name, None)

    def _buffer(self, name: str, index: Tensor | None) -> None:
        device = next(self.parameters()).device if any(True for _ in self.parameters()) else None
        self.register_buffer(name, index if index is None else index.to(device), persistent=False)


class StreamEntry(Prunable):
    """Where the host's tokens enter the residual stream: pruned channels are left behind. Has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer("emb", None)

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._buffer("emb", _index(keeps["emb"]))

    def forward(self, x: Tensor) -> Tensor:
        return functional.enter_stream(x, self.emb)


class LayerNorm(Prunable):
    """LayerNorm over kept channels; weight and bias `(emb,)`. With `entry`, the stream is entered through it."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, eps: float, entry: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.entry = weight, bias, eps, entry
        self._buffer("emb", None)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._buffer("emb", _index(keeps["emb"]))

    def forward(self, x: Tensor) -> Tensor:
        if self.entry:
            x = functional.enter_stream(x, self.emb)
        y = functional.kept_layer_norm(x, self.weight, self.bias, self.emb, self.eps)
        # A norm at the entry writes the stream and reads none of it, so that no gate sits behind it.
        return y if self.tap is None or self.entry else self.tap("emb", y)


class HeadNorm(Prunable):
    """LayerNorm of queries or keys over kept dims, head by head; weight and bias `(qk_dim,)`, shared by all heads."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps
        self._buffer("qk_dim", None)

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._buffer("qk_dim", _index(keeps["qk_dim"]))

    def forward(self, x: Tensor) -> Tensor:
        return functional.kept_layer_norm(x, self.weight, self.bias, self.qk_dim, self.eps)


class LayerScale(Prunable):
    def __init__(self, gamma: nn.Parameter) -> None:
        super().__init__()
        self.gamma = gamma
        self._buffer("emb", None)

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._buffer("emb", _index(keeps["emb"]))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_scale(x, self.gamma, self.emb)


class Classifier(Prunable):
    """A linear layer that reads the stream: its inputs are kept channels, its outputs are all kept."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self._buffer("emb", None)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._buffer("emb", _index(keeps["emb"]))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias, cols=self.emb)


class Attention(Prunable):
    """Self-attention with a fused qkv whose query/key and value widths differ.

    Args:
        qkv, proj: the host's linear layers, kept as they are; see `functional.attention` for their layout.
        heads, qk_dim, v_dim: dense widths.
        scale: of the logits.
        q_norm, k_norm: of queries and keys, a `HeadNorm` or None.
    """

    def __init__(
        self,
        qkv: nn.Linear,
        proj: nn.Linear,
        *,
        heads: int,
        qk_dim: int,
        v_dim: int,
        scale: float,
        q_norm: HeadNorm | None = None,
        k_norm: HeadNorm | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.qkv, self.q_norm, self.k_norm, self.proj = qkv, q_norm, k_norm, proj
        self.heads, self.qk_dim, self.v_dim, self.scale = heads, qk_dim, v_dim, scale
        self.attn_drop, self.proj_drop = attn_drop, nn.Dropout(proj_drop)
        self.kept = (heads, qk_dim, v_dim)
        for name in ("emb", "qkv_rows", "proj_cols"):
            self._buffer(name, None)

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        heads, qk, v = (keeps[kind].cpu() for kind in ("heads", "qk_dim", "v_dim"))
        self.kept = (int(heads.sum()), int(qk.sum()), int(v.sum()))
        self._buffer("emb", _index(keeps["emb"]))
        self._buffer("qkv_rows", _index(torch.cat([_outer(heads, qk), _outer(heads, qk), _outer(heads, v)])))
        self._buffer("proj_cols", _index(_outer(heads, v)))

    def extra_repr(self) -> str:
        return "heads={}, qk_dim={}, v_dim={}".format(*self.kept)

    def resize_(self, heads: int, qk_dim: int, v_dim: int) -> None:
        """Declare new dense widths, after the weights were cut to them."""
        self.heads, self.qk_dim, self.v_dim = self.kept = (heads, qk_dim, v_dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if is_causal:
            raise ValueError("causal attention is not supported in a prunable model; pass attn_mask instead")
        heads, qk_dim, v_dim = self.kept
        out = functional.attention(
            x,
            self.qkv.weight,
            self.qkv.bias,
            self.proj.weight,
            self.proj.bias,
            heads=heads,
            qk_dim=qk_dim,
            v_dim=v_dim,
            scale=self.scale,
            emb=self.emb,
            qkv_rows=self.qkv_rows,
            proj_cols=self.proj_cols,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            attn_mask=attn_mask,
            dropout=self.attn_drop if self.training else 0.0,
            tap=self.tap,
        )
        return self.proj_drop(out)


class Mlp(Prunable):
    """fc1, activation, fc2 with a prunable hidden width."""

    def __init__(self, fc1: nn.Linear, fc2: nn.Linear, act: nn.Module, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = fc1, fc2, act
        self.drop = nn.Dropout(drop)
        for name in ("emb", "hidden"):
            self._buffer(name, None)

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        self._buffer("emb", _index(keeps["emb"]))
        self._buffer("hidden", _index(keeps["mlp"]))

    def forward(self, x: Tensor) -> Tensor:
        out = functional.mlp(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            self.act,
            emb=self.emb,
            hidden=self.hidden,
            dropout=self.drop.p if self.training else 0.0,
            tap=self.tap,
        )
        return self.drop(out)


class GatedMlp(Prunable):
    """fc2(act(gate) * value) with a prunable hidden width, as SwiGLU.

    Args:
        first: the host's layers before the product, by their names there: the gate's and the value's, or one packed
            layer whose first half of rows is the gate (the second, with `gate_last`).
    """

    def __init__(
        self,
        first: Mapping[str, nn.Linear],
        fc2: nn.Linear,
        act: nn.Module,
        drop: float = 0.0,
        gate_last: bool = False,
    ) -> None:
        super().__init__()
        self.first_names, self.gate_last = tuple(first), gate_last
        for name, layer in first.items():
            setattr(self, name, layer)
        self.fc2, self.act = fc2, act
        self.drop = nn.Dropout(drop)
        for name in ("emb", "first_rows", "hidden"):
            self._buffer(name, None)

    @property
    def first(self) -> list[nn.Linear]:
        return [getattr(self, name) for name in self.first_names]

    def keep_(self, keeps: Mapping[str, Tensor]) -> None:
        hidden = keeps["mlp"]
        self._buffer("emb", _index(keeps["emb"]))
        self._buffer("first_rows", _index(hidden if len(self.first_names) == 2 else hidden.repeat(2)))
        self._buffer("hidden", _index(hidden))

    def forward(self, x: Tensor) -> Tensor:
        out = functional.gated_mlp(
            x,
            [(layer.weight, layer.bias) for layer in self.first],
            self.fc2.weight,
            self.fc2.bias,
            self.act,
            gate_last=self.gate_last,
            emb=self.emb,
            first_rows=self.first_rows,
            hidden=self.hidden,
            dropout=self.drop.p if self.training else 0.0,
            tap=self.tap,
        )
        return self.drop(out)


def prunable_layers(model: nn.Module) -> dict[str, Prunable]:
    """Every prunable layer of a prepared model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Prunable)}


def keep_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Let every layer of a prepared model compute over the units that `masks` keeps (bool per group)."""
    for layer in prunable_layers(model).values():
        layer.keep_({kind: masks[group] for kind, group in layer.axes.items()})
