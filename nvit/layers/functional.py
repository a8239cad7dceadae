"""The mathematics of a pruned block on plain tensors; the only door through which fused kernels enter.

Conventions. `x` is the residual stream `(batch, tokens, emb)`. An index (int64, ascending) names what is kept along
one dimension of a weight; `None` means all of it. Masked weights keep their dense shape: each operation gathers the
kept part and multiplies densely, so that its cost follows what is kept and its gradients are exactly zero elsewhere.
The stream itself carries kept channels only, from `enter_stream` to the classifier. Linear layers come as a `Project`,
something that is called: a kernel that reads weights runs only where weights say all (`projection.as_tensors`).

A watch, where one is given, is called as `watch(site, activation, again)` on an activation where units leave the
network (see `layers.sites`), and returns it unchanged; `calibration.capture` uses it to read activations and their
gradients. The first dimension is the image. `again`, `(function, *tensors)`, computes the activation once more from
tensors that the backward pass keeps anyway, so that the activation itself need not be kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import choice
from .added import of_keys, one_mask, per_head_and_window
from .projection import Project, Projection, as_tensors, hooks, linear, take
from .rotary import Rotary
from .sites import Watch

__all__ = [
    "Projection",
    "Rotary",
    "attention",
    "enter_stream",
    "gated_mlp",
    "group_dot",
    "kept_norm",
    "kernels",
    "layer_scale",
    "linear",
    "merge_tokens",
    "mlp",
    "take",
    "unmerge_tokens",
    "watch_windows",
]

# Of the process and not a context variable: a backward pass that computes activations again does so on a thread of its
# own, which must choose as the forward pass did.
_kernels_on = True


@contextmanager
def kernels(on: bool) -> Iterator[None]:
    """Inside, fused kernels run where they can, or nowhere (`--no-kernels`); afterwards as before. Outside they run."""
    global _kernels_on
    before, _kernels_on = _kernels_on, on
    try:
        yield
    finally:
        _kernels_on = before


def _kernels(x: Tensor) -> ModuleType | None:
    """`nvit_kernels.functional` where kernels may run on `x`, else None; its `<op>_takes` says whether one does.

    The kept part is gathered first here as well: at the narrow width the kernels meet every projection, not only the
    ones with kept lists, so that a masked step costs what a compact one does.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not _kernels_on or not (x.is_cuda or interpreted) or x.dtype == torch.float64:
        return None
    from nvit_kernels import functional

    return functional


def enter_stream(x: Tensor, emb: Tensor | None) -> Tensor:
    """Tokens `(batch, tokens, dense emb)` from the host's embedding to the stream of kept channels."""
    return x if emb is None else x.index_select(-1, emb)


def kept_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor | None, eps: float, *, rms: bool = False
) -> Tensor:
    """LayerNorm, or RMSNorm, whose statistics count kept channels only.

    Args:
        x: `(..., kept)`.
        weight, bias: `(dense,)`.
        kept: kept channels of the weight.
    """
    weight, bias = take(weight, kept), None if bias is None else take(bias, kept)
    if rms:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)

    if (kernels := _kernels(x)) and kernels.kept_layer_norm_takes(x):
        return choice.run("layer_norm", partial(kernels.kept_layer_norm, eps=eps), plain, x, weight, bias)
    return plain(x, weight, bias)


def layer_scale(x: Tensor, gamma: Tensor, emb: Tensor | None) -> Tensor:
    """LayerScale: `x` `(..., kept emb)` times the kept part of `gamma` `(dense emb,)`."""
    return x * take(gamma, emb)


def watch_windows(watch: Watch, windows: int) -> Watch:
    """A watch for activations of `(batch · windows, …)`: the first dimension is the image again."""
    return lambda site, x, again=None: watch(site, x.unflatten(0, (-1, windows)), None).flatten(0, 1)


def _watch_queries(watch: Watch, q: Tensor, pairs: str | None) -> Tensor:
    if pairs is None:
        return watch("qk", q, None)
    return watch("qk", q.unflatten(-1, (2, -1) if pairs == "half" else (-1, 2)), None).flatten(-2)


def attention(
    x: Tensor,
    inputs: Sequence[Project],
    proj: Project,
    *,
    heads: int,
    qk_dim: int,
    v_dim: int,
    scale: float,
    q_norm: Callable[[Tensor], Tensor] | None = None,
    k_norm: Callable[[Tensor], Tensor] | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    gate: Project | None = None,
    rope: Rotary | None = None,
    pairs: str | None = None,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
    sizes: Tensor | None = None,
    with_keys: bool = False,
    watch: Watch | None = None,
    maps: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head self-attention with separate query/key and value widths, over kept heads and dims.

    Args:
        x: `(batch, tokens, kept emb)`.
        inputs: one projection of `x` to all queries, then keys, then values, head by head, `heads·(2·qk + v)` wide; or
            one to each.
        proj: back to the stream, from `(batch, tokens, heads·v)`.
        heads, qk_dim, v_dim: how many are kept.
        scale: of the logits; the dense model's, whatever is kept.
        q_norm, k_norm: norms over the kept dims of every head, `(batch, tokens, heads, qk)` to the same shape. The
            watch sees queries after theirs, so that removing a unit is measured on what the keys meet.
        norm: over all heads' outputs together, `(batch, tokens, heads·v)` to the same shape.
        gate: a projection of `x` whose sigmoid multiplies the heads' outputs, after their norm.
        rope, pairs: turn queries and keys, after their norms, see `Rotary`.
        bias: of the position, added to the logits of every kept head, `(heads, tokens, tokens)` or with a 1 in front.
        attn_mask: additive or boolean, broadcastable to `(batch, heads, tokens, tokens)`, or `(windows, 1, tokens,
            tokens)` for a batch whose windows come one image after another.
        sizes: how many tokens each stands for, float32 `(batch, tokens)`: their logs are added to its logits as a key.
        maps: the watch sees the softmax itself too, `(batch, heads, tokens, tokens)`, which nothing else needs whole.

    Returns:
        `(batch, tokens, kept emb)`; `with_keys`, the keys `(batch, heads, tokens, qk)` as well.
    """
    batch, tokens, _ = x.shape
    parts = [project(x) for project in inputs]
    if len(parts) == 1:
        parts = parts[0].split((heads * qk_dim, heads * qk_dim, heads * v_dim), dim=-1)
    q, k, v = (p.unflatten(-1, (heads, -1)) for p in parts)
    q, k = q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if rope is not None:
        q, k = rope(q, pairs), rope(k, pairs)
    if watch is not None:
        q = _watch_queries(watch, q, pairs)
    mass = None if sizes is None else sizes.log()
    if watch is not None and maps:
        # What the softmax makes of the identity is the softmax, whichever way it is computed.
        units = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*k.shape[:2], -1, -1)
        watch("maps", _attend(q, k, units, scale, bias, attn_mask, 0.0, mass), None)
    out = _attend(q, k, v, scale, bias, attn_mask, dropout, mass).transpose(1, 2).reshape(batch, tokens, heads * v_dim)
    out = out if norm is None else norm(out)
    if gate is not None:
        out = out * gate(x).sigmoid()
    if watch is not None:
        out = watch("out", out.unflatten(-1, (heads, -1)), None).flatten(-2)
    return (proj(out), k) if with_keys else proj(out)


def merge_tokens(x: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `r` tokens of every image most like another merged into it; see `nvit_kernels.reference.merge_tokens`."""
    from nvit_kernels import reference
    from nvit_kernels.ops.merge_tokens import native

    if (kernels := _kernels(x)) and kernels.merge_tokens_takes(x, keys, prefix):
        return kernels.merge_tokens(x, keys, sizes, r, prefix)
    run = native.merge_tokens if _kernels_on and native.takes(x, keys, sizes) else reference.merge_tokens
    return run(x, keys, sizes, r, prefix)


def unmerge_tokens(x: Tensor, place: Tensor) -> Tensor:
    """Every token back at its place, as the mean that it went into."""
    from nvit_kernels import reference

    return reference.unmerge_tokens(x, place)


DotSlice = tuple[str, int, int | None, tuple[int, ...], int, int]
"""Parameter name, first and last row, view, axis, first place among the outputs."""


def group_dot(params: Mapping[str, Tensor], grads: Mapping[str, Tensor], slices: Sequence[DotSlice]) -> Tensor | None:
    """Σ grad · weight of every unit of `slices` in a few launches for the whole model, fp32 `(outputs,)`.

    None where no fused kernel runs; `nvit.saliency` then sums slice by slice.
    """
    first = params[slices[0][0]]
    kernels = _kernels(first)
    if kernels is None or not kernels.group_dot_takes(first):
        return None
    shapes = tuple((name, tuple(params[name].shape)) for name in dict.fromkeys(s[0] for s in slices))
    return kernels.group_dot(params, grads, _plan(tuple(slices), shapes))


@lru_cache(maxsize=8)
def _plan(slices: tuple[DotSlice, ...], shapes: tuple[tuple[str, tuple[int, ...]], ...]):
    from nvit_kernels import functional

    return functional.GroupDotPlan([functional.DotSlice(*s) for s in slices], dict(shapes))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, attn_mask: Tensor | None, dropout: float,
    mass: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale · q kᵀ + bias + mask + mass of keys) v: `(batch, heads, tokens, v_dim)`."""
    plain = partial(_torch_attention, scale=scale, dropout=dropout)
    if mass is not None:
        # The kernel adds a mass alone, as a constant.
        alone = bias is None and attn_mask is None and not dropout and not mass.requires_grad
        if alone and (kernels := _kernels(q)) and kernels.attention_takes_mass(q, k, v):

            def with_mass(q: Tensor, k: Tensor, v: Tensor, _: None, __: None, mass: Tensor) -> Tensor:
                return kernels.attention(q, k, v, scale, mass=mass)

            return choice.run("attention", with_mass, plain, q, k, v, None, None, mass)
        return plain(q, k, v, bias, attn_mask, mass)
    if not dropout and (kernels := _kernels(q)) and kernels.attention_takes(q, v.shape[-1]):
        added = per_head_and_window(q, bias, attn_mask)
        if added is not None:

            def kernel(q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> Tensor:
                return kernels.attention(q, k, v, scale, bias=added[0], mask=added[1])

            return choice.run("attention", kernel, plain, q, k, v, bias, attn_mask)
    return plain(q, k, v, bias, attn_mask)


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, attn_mask: Tensor | None, mass: Tensor | None = None, *,
    scale: float, dropout: float,
) -> Tensor:  # fmt: skip
    """`_attend` by torch's own attention."""
    qk_dim, v_dim = q.shape[-1], v.shape[-1]
    if qk_dim != v_dim and q.device.type == "cpu":
        # The fused CPU kernel wants one width: zero columns add nothing to the logits or are cut off again.
        wide = max(qk_dim, v_dim)
        q, k, v = (F.pad(t, (0, wide - t.shape[-1])) if t.shape[-1] < wide else t for t in (q, k, v))
    if mass is not None:
        of_sizes = of_keys(mass, q)
        attn_mask = of_sizes if attn_mask is None else one_mask(q.shape[0], of_sizes, attn_mask)
    attn_mask = one_mask(q.shape[0], bias, attn_mask)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, scale=scale)
    return out[..., :v_dim]


def gated_mlp(
    x: Tensor,
    first: Sequence[Project],
    last: Project,
    act: Callable[[Tensor], Tensor],
    *,
    gate_last: bool = False,
    norm: Callable[[Tensor], Tensor] | None = None,
    dropout: float = 0.0,
    watch: Watch | None = None,
) -> Tensor:
    """last(act(gate) * value) over kept hidden units, as SwiGLU: `(batch, tokens, kept emb)` to the same shape.

    Args:
        first: to the gate and to the value, or one projection to both, side by side.
        gate_last: the value comes before the gate.
        norm: over the hidden units; the watch sees them after it.
    """
    parts = [project(x) for project in first]
    gate, value = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
    if gate_last:
        gate, value = value, gate
    again = (lambda gate, value: act(gate) * value, gate, value)
    return _last(again, last, norm, dropout, watch)


def _last(again, last: Project, norm, dropout, watch) -> Tensor:
    """From kept hidden units, as `again` computes them, back to the stream."""
    function, *inputs = again
    h = function(*inputs)
    if dropout:
        h = F.dropout(h, dropout)
    h = h if norm is None else norm(h)
    if watch is not None:
        h = watch("out", h, again if norm is None and not dropout else None)
    return last(h)


def _is_exact_gelu(act: Callable[[Tensor], Tensor]) -> bool:
    return type(act) is nn.GELU and act.approximate == "none" and not hooks(act)


def mlp(
    x: Tensor,
    fc1: Project,
    fc2: Project,
    act: Callable[[Tensor], Tensor],
    *,
    norm: Callable[[Tensor], Tensor] | None = None,
    dropout: float = 0.0,
    watch: Watch | None = None,
) -> Tensor:
    """fc1, activation, fc2 over kept hidden units: `(batch, tokens, kept emb)` to the same shape."""
    if watch is None and norm is None and not dropout and _is_exact_gelu(act) and (kernels := _kernels(x)):
        first, second = as_tensors(fc1), as_tensors(fc2)
        if first and second and kernels.mlp_takes(x, x.shape[-1], first.shape[0], second.shape[0]):

            def plain(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
                return F.linear(act(F.linear(x, w1, b1)), w2, b2)

            return choice.run("mlp", kernels.mlp, plain, x, *first.kept(), *second.kept())
    return _last((act, fc1(x)), fc2, norm, dropout, watch)
