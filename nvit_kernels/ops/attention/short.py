"""Attention over short rows: what it takes, launches, gradients. Derivations: docs/kernels/attention_short.md."""

from __future__ import annotations

import torch
from torch import Tensor

from nvit_kernels.launch import FUSED_MULTIPLY_ADD, INTERPRET, on_device, power_of_two
from nvit_kernels.ops.attention.short_kernels import LOG2E, backward_kernel, forward_kernel, scores_kernel
from nvit_kernels.ops.attention.short_layouts import (
    INTERPRETED,
    LARGEST_HEAD,
    LARGEST_TOKENS,
    Config,
    architecture,
    backward_config,
    backward_keys,
    forward_config,
    key_pieces,
    padded,
)

Scores = tuple[Tensor | None, Tensor | None, Tensor | None]  # head, qk and v buffers, as `reference.attention` has them


def takes(q: Tensor, v_width: int, gradients: bool = True) -> bool:
    """Whether these kernels are offered for q `(batch, heads, tokens, qk_dim)` and values of `v_width` dims a head.

    They are for float16 and bfloat16, at most 208 tokens and heads of at most 64 dims; with `gradients` also only where
    the backward has a layout that fits the device. float32 is for the interpreter alone.
    """
    tokens, width = q.shape[2:]
    dtypes = (torch.float16, torch.bfloat16) if q.is_cuda else (torch.float16, torch.float32) if INTERPRET else ()
    if q.dtype not in dtypes or tokens > LARGEST_TOKENS or width % 8 or v_width % 8:
        return False
    if not 0 < width <= LARGEST_HEAD or not 0 < v_width <= LARGEST_HEAD or not q.numel():
        return False
    arch = architecture(q.device)
    return not gradients or not arch or backward_config(arch, tokens, width, v_width) is not None


def _alike(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k as they are where they share strides the kernels read, else copies that do."""
    return (q, k) if q.stride() == k.stride() and _readable(q) and _readable(k) else (_by_token(q), _by_token(k))


def _readable(x: Tensor) -> bool:
    return x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:3]) and x.data_ptr() % 16 == 0


def _by_token(x: Tensor) -> Tensor:
    """`x` `(batch, heads, tokens, dim)` laid out token by token: itself where it is so already."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_by_token(like: Tensor, batch: int, heads: int, tokens: int, dim: int) -> Tensor:
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _strides8(prefix: str, x: Tensor) -> dict[str, int]:
    """Strides of samples, heads and tokens divided by 8, by the names that the kernels have for them."""
    b, h, n, _ = x.stride()
    return {f"{prefix}_b8": b // 8, f"{prefix}_h8": h // 8, f"{prefix}_n8": n // 8}


def _sizes(q: Tensor, v: Tensor, config: Config, block_qk: int, block_v: int) -> dict[str, object]:
    """The arguments that both kernels have, by name."""
    _, heads, tokens, width = q.shape
    return dict(
        H=heads,
        QK8=width // 8,
        V8=v.shape[-1] // 8,
        **_strides8("qk", q),
        **_strides8("v", v),
        N=tokens,
        BLOCK_M=config.rows,
        BLOCK_QK=block_qk,
        BLOCK_V=block_v,
        STAGES=config.stages,
        num_warps=config.warps,
        num_stages=1,
        **FUSED_MULTIPLY_ADD,
    )


def launch(q: Tensor, k: Tensor, v: Tensor, scale: float, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """o `(batch, heads, tokens, v_dim)`, laid out token by token; float32 log2-sums `(batch, heads, tokens)`."""
    (b, h, n, d), e = q.shape, v.shape[-1]
    q, k = _alike(q, k)
    v = v if _readable(v) else _by_token(v)
    o, lse = _empty_by_token(q, b, h, n, e), q.new_empty(b, h, n, dtype=torch.float32)
    config = config or (INTERPRETED if INTERPRET else forward_config(architecture(q.device), n))
    with on_device(q):
        forward_kernel[(b * h,)](
            q=q,
            k=k,
            v=v,
            o=o,
            lse=lse,
            scale_log2=scale * LOG2E.value,
            **_sizes(q, v, config, power_of_two(d), power_of_two(e)),
            **dict(zip(("KEYS_A", "KEYS_B", "KEYS_C"), key_pieces(n), strict=True)),
        )
    return o, lse


def separate_gradients(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised ∂q, ∂k, ∂v, each laid out token by token."""
    return tuple(_empty_by_token(q, *x.shape) for x in (q, q, v))


def launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float,
    gradients: tuple[Tensor, Tensor, Tensor], scores: Scores, config: Config | None = None,
) -> None:  # fmt: skip
    """Fill `gradients`, separate or the parts of one packed tensor, and add to the `scores` that are there."""
    (b, h, n, d), e = q.shape, v.shape[-1]
    dq, dk, dv = gradients
    q, k = _alike(q, k)
    v = v if _readable(v) else _by_token(v)
    do, o = _by_token(do), _by_token(o)
    do = do if do.data_ptr() % 16 == 0 else do.clone()
    arch = architecture(q.device)
    config = config or (backward_config(arch, n, d, e) if arch else INTERPRETED)
    wanted = any(buffer is not None for buffer in scores)
    qk_part, v_part, head_part = (
        q.new_empty(b, h, width, dtype=torch.float32) if wanted else None for width in (d, e, 1)
    )
    keys = backward_keys(arch, n)
    with on_device(q):
        backward_kernel[(b * h,)](
            q=q,
            k=k,
            v=v,
            o=o,
            do=do,
            lse=lse,
            delta=torch.empty_like(lse) if config.delta_first else None,
            dq=dq,
            dk=dk,
            dv=dv,
            qk_part=qk_part,
            v_part=v_part,
            head_part=head_part,
            scale=scale,
            **_sizes(q, v, config, *padded(arch, config.rows, d, e)),
            PACKED=dq.stride(2) != h * d,
            KEYS=keys,
            CHUNK=min(keys, 128),
        )
        if wanted:
            _add_scores(scores, qk_part, v_part, head_part)


def _add_scores(scores: Scores, qk_part: Tensor, v_part: Tensor, head_part: Tensor) -> None:
    """Add the sums over tokens to buffers `(batch, units)`, or `(units,)` summed over the batch too."""
    batch, heads, width = qk_part.shape
    whole = [b if b is None or b.is_contiguous() else torch.zeros_like(b).contiguous() for b in scores]
    samples = [1 if b is None or b.dim() == 2 else batch for b in whole]
    units = max(heads, width, v_part.shape[-1])
    scores_kernel[(-(-units // 16), batch if 1 in samples else 1, 3)](
        qk_part=qk_part,
        v_part=v_part,
        head_part=head_part,
        head_scores=whole[0],
        qk_scores=whole[1],
        v_scores=whole[2],
        head_samples=samples[0],
        qk_samples=samples[1],
        v_samples=samples[2],
        B=batch,
        H=heads,
        D=width,
        E=v_part.shape[-1],
        ROWS=min(256, power_of_two(batch * heads)),
        UNITS=16,
    )
    for buffer, summed in zip(scores, whole, strict=True):
        if buffer is not summed:
            buffer += summed


class ShortAttention(torch.autograd.Function):
    """The hot path, on q, k and v apart."""

    @staticmethod
    def forward(ctx, q, k, v, scale, head_scores, qk_scores, v_scores):
        o, lse = launch(q, k, v, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale, ctx.scores = scale, (head_scores, qk_scores, v_scores)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        gradients = separate_gradients(q, v)
        launch_backward(do, q, k, v, o, lse, ctx.scale, gradients, ctx.scores)
        return *gradients, None, None, None, None


class PackedShortAttention(torch.autograd.Function):
    """The hot path on a packed projection, whose gradient is written packed: no unbind and no stack of it."""

    @staticmethod
    def forward(ctx, qkv, scale, head_scores, qk_scores, v_scores):
        o, lse = launch(*unpack(qkv), scale)
        ctx.save_for_backward(qkv, o, lse)
        ctx.scale, ctx.scores = scale, (head_scores, qk_scores, v_scores)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        qkv, o, lse = ctx.saved_tensors
        gradient = qkv.new_empty(qkv.shape)
        launch_backward(do, *unpack(qkv), o, lse, ctx.scale, unpack(gradient), ctx.scores)
        return gradient, None, None, None, None


def unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `(batch, heads, tokens, dim)` as views of a projection `(batch, tokens, 3, heads, dim)`."""
    return tuple(t.transpose(1, 2) for t in qkv.unbind(2))


@torch.library.custom_op("nvit::attention_short", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, scale: float,
    head_scores: Tensor | None, qk_scores: Tensor | None, v_scores: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`launch` for torch.compile and export; the buffers are for its backward."""
    return launch(q, k, v, scale)


@forward_op.register_fake
def _(q, k, v, scale, head_scores, qk_scores, v_scores):
    return _empty_by_token(q, *v.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("nvit::attention_short_backward", mutates_args=("head_scores", "qk_scores", "v_scores"))
def backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float,
    head_scores: Tensor | None, qk_scores: Tensor | None, v_scores: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`launch_backward` for torch.compile; adds to the score buffers it is given."""
    gradients = separate_gradients(q, v)
    launch_backward(do, q, k, v, o, lse, scale, gradients, (head_scores, qk_scores, v_scores))
    return gradients


@backward_op.register_fake
def _(do, q, k, v, o, lse, scale, head_scores, qk_scores, v_scores):
    return separate_gradients(q, v)


def _save(ctx, inputs, output):
    q, k, v, ctx.scale, *scores = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)
    ctx.scores = scores  # written by the backward, so not among what autograd guards against writing


def _differentiate(ctx, do, _):
    return *backward_op(do, *ctx.saved_tensors, ctx.scale, *ctx.scores), None, None, None, None


forward_op.register_autograd(_differentiate, setup_context=_save)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected (batch, heads, tokens, "
                         "qk_dim) twice and (batch, heads, tokens, v_dim)")  # fmt: skip
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype")
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if not takes(q, v.shape[-1], gradients):
        raise ValueError(f"attention_short is not offered for {q.dtype} {tuple(q.shape)} with values of {v.shape[-1]} "
                         f"dims on {q.device}; nvit_kernels.functional.attention takes other shapes")  # fmt: skip


def attention_short(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    head_scores: Tensor | None = None,
    qk_scores: Tensor | None = None,
    v_scores: Tensor | None = None,
) -> Tensor:
    """Fused `nvit_kernels.reference.attention` for what `takes` says, with everything kept and nothing added.

    Raises:
        ValueError: shapes or dtypes disagree, or `takes` is False.
    """
    _check(q, k, v)
    if torch.compiler.is_compiling():
        return forward_op(q, k, v, float(scale), head_scores, qk_scores, v_scores)[0]
    return ShortAttention.apply(q, k, v, float(scale), head_scores, qk_scores, v_scores)


def attention_short_packed(
    qkv: Tensor,
    scale: float,
    head_scores: Tensor | None = None,
    qk_scores: Tensor | None = None,
    v_scores: Tensor | None = None,
) -> Tensor:
    """`attention_short` of a projection `(batch, tokens, 3, heads, dim)`, whose gradient comes packed like it.

    The backward of `unbind` copies three gradients into one tensor: 116 MB moved at 64 x 12 heads of 197 x 64, against
    156 MB of the whole backward. This writes them there.

    Raises:
        ValueError: as `attention_short`.
    """
    q, k, v = unpack(qkv)
    if torch.compiler.is_compiling():
        return attention_short(q, k, v, scale, head_scores, qk_scores, v_scores)
    _check(q, k, v)
    return PackedShortAttention.apply(qkv, float(scale), head_scores, qk_scores, v_scores)
