"""Attention over kept heads and dims: checks, launches and gradients; the backward also gives the scores.

Derivations and shapes: docs/kernels/attention.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from nvit_kernels.configs import tuned
from nvit_kernels.launch import FUSED_MULTIPLY_ADD, check_list, eighths, matmul_precision, on_device, power_of_two
from nvit_kernels.ops.attention.backward_kernels import dbias_kernel, delta_kernel, dkv_kernel, dq_kernel
from nvit_kernels.ops.attention.kernels import forward_kernel

LARGEST_HEAD = 256
BIAS_PROGRAMS = 1024
LOG2E = 1.4426950408889634


forward_tuned = tuned("attention_forward", forward_kernel)
dkv_tuned = tuned("attention_dkv", dkv_kernel)
dq_tuned = tuned("attention_dq", dq_kernel)
dbias_tuned = tuned("attention_dbias", dbias_kernel)


def score_rows(head: int) -> int:
    """Token rows per program wherever partial scores are laid out by them, so never tuned: fewer for wide heads."""
    return 64 if head <= 128 else 32


def bias_splits(batch: int, heads: int, tokens: int) -> int:
    """Parts that the sum of the bias's gradient over samples is cut into: enough programs to fill a GPU.

    It counts tiles of 64 x 64, whatever is tuned, so that the order of summation is a matter of shapes alone.
    """
    return max(1, min(batch, triton.cdiv(BIAS_PROGRAMS, heads * triton.cdiv(tokens, 64) ** 2)))


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of samples, heads and tokens; those of a single head or token, which mean nothing, so that samples fit.

    The kernels take a sample to be as long as all its tokens or all its heads, whichever is more.
    """
    _, heads, tokens, _ = x.shape
    b, h, n, _ = x.stride()
    return b, 0 if heads == 1 else h, b if tokens == 1 else n


def _readable(x: Tensor) -> Tensor:
    """`x` as it is where its rows are contiguous and 16-byte aligned and its samples end to end, else a copy."""
    batch, heads, tokens, _ = x.shape
    b, h, n = _strides(x)
    aligned = x.stride(-1) == 1 and b % 8 == h % 8 == n % 8 == 0 and x.data_ptr() % 16 == 0
    return x if aligned and (batch == 1 or b == max(tokens * n, heads * h)) else x.contiguous()


def _readable_alike(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Both readable, with the same strides."""
    q, k = _readable(q), _readable(k)
    return (q, k) if _strides(q) == _strides(k) else (q.contiguous(), k.contiguous())


def _strides8(prefix: str, x: Tensor) -> dict[str, int]:
    """Strides of heads and tokens divided by 8, by the names that the kernels have for them."""
    _, h, n = _strides(x)
    return {f"{prefix}_h8": h // 8, f"{prefix}_n8": n // 8}


def _by_token(batch: int, heads: int, tokens: int, dim: int, like: Tensor) -> Tensor:
    """Uninitialised `(batch, heads, tokens, dim)` laid out token by token, as the projection reads it."""
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise `ValueError` unless q, k, v are `(batch, heads, tokens, dim)` of one dtype with heads the kernels take."""
    if q.dim() != 4 or k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected (batch, heads, tokens, "
                         "qk_dim) twice and (batch, heads, tokens, v_dim)")  # fmt: skip
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype")
    if max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD:
        raise ValueError(f"head dims {q.shape[-1]} and {v.shape[-1]} exceed {LARGEST_HEAD}, the most a tile holds")
    eighths("head dims", q.shape[-1], v.shape[-1])


def check_added(q: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    """Raise `ValueError` unless bias `(heads, tokens, tokens)` and mask `(windows, tokens, tokens)` fit q."""
    batch, heads, tokens, _ = q.shape
    if bias is not None and bias.shape != (heads, tokens, tokens):
        raise ValueError(f"bias is {tuple(bias.shape)}, expected (heads, tokens, tokens), {(heads, tokens, tokens)}")
    if mask is not None and (mask.shape[1:] != (tokens, tokens) or not len(mask) or batch % len(mask)):
        raise ValueError(f"mask is {tuple(mask.shape)}, expected (windows, {tokens}, {tokens}) with a number of "
                         f"windows that divides the batch of {batch}")  # fmt: skip
    for name, t in (("bias", bias), ("mask", mask)):
        if t is not None and (t.dtype not in (q.dtype, torch.float32) or t.device != q.device):
            raise ValueError(f"{name} is {t.dtype} on {t.device}; q on {q.device} takes {q.dtype} or torch.float32")


def check_kept(q: Tensor, v: Tensor, heads: Tensor | None, qk_mask: Tensor | None, v_mask: Tensor | None) -> None:
    """Raise `ValueError` unless what is kept is listed for these widths, on this device."""
    check_list(heads, q.shape[1], q.device)
    for name, mask, width in (("qk", qk_mask, q.shape[-1]), ("v_dim", v_mask, v.shape[-1])):
        if mask is not None and (mask.numel() != width or mask.device != q.device):
            raise ValueError(f"{name} lists {mask.numel()} dims on {mask.device}, the tensor has {width} on {q.device}")


def _whole_rows(x: Tensor) -> Tensor:
    """`(·, tokens, tokens)` contiguous, with rows filled up to a multiple of 8 by -inf."""
    return F.pad(x, (0, -x.shape[-1] % 8), value=float("-inf")).contiguous() if x.shape[-1] % 8 else x.contiguous()


@torch.library.custom_op("nvit::attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float,
    heads: Tensor | None, heads_n: Tensor | None, qk_mask: Tensor | None, v_mask: Tensor | None,
    head_scores: Tensor | None, qk_scores: Tensor | None, v_scores: Tensor | None,
    bias: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check(q, k, v)
    check_added(q, bias, mask)
    check_kept(q, v, heads, qk_mask, v_mask)
    (q, k), v = _readable_alike(q, k), _readable(v)
    b, h, n, _ = q.shape
    o, stats = _by_token(b, h, n, v.shape[-1], q), q.new_empty(b, h, 2, n, dtype=torch.float32)
    shared = _shared(q, v, heads, heads_n, qk_mask, v_mask, bias, mask)
    with on_device(q):
        forward_tuned[lambda meta: (triton.cdiv(n, meta["BLOCK_M"]), h, b)](
            q=q, k=k, v=v, o=o, stats=stats, scale_log2=scale * LOG2E, **shared, **FUSED_MULTIPLY_ADD
        )
    return o, stats


def _shared(q, v, heads, heads_n, qk_mask, v_mask, bias, mask) -> dict[str, object]:
    """The arguments that forward, dq, dkv and dbias have in common, by name."""
    _, h, n, d = q.shape
    e = v.shape[-1]
    return dict(
        heads=heads,
        heads_n=heads_n,
        qk_mask=qk_mask,
        v_mask=v_mask,
        bias=None if bias is None else _whole_rows(bias),
        window=None if mask is None else _whole_rows(mask),
        windows=None if mask is None else len(mask),
        H=h,
        N=n,
        QK8=d // 8,
        V8=e // 8,
        **_strides8("qk", q),
        **_strides8("v", v),
        PRECISION=matmul_precision(),
        BLOCK_QK=power_of_two(d),
        BLOCK_V=power_of_two(e),
    )


@_forward.register_fake
def _(q, k, v, scale, heads, heads_n, qk_mask, v_mask, head_scores, qk_scores, v_scores, bias, mask):
    b, h, n, _ = q.shape
    return _by_token(b, h, n, v.shape[-1], q), q.new_empty(b, h, 2, n, dtype=torch.float32)


@torch.library.custom_op("nvit::attention_backward", mutates_args=("head_scores", "qk_scores", "v_scores"))
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor, scale: float,
    heads: Tensor | None, heads_n: Tensor | None, qk_mask: Tensor | None, v_mask: Tensor | None,
    head_scores: Tensor | None, qk_scores: Tensor | None, v_scores: Tensor | None,
    bias: Tensor | None, mask: Tensor | None, wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (q, k), v, do = _readable_alike(q, k), _readable(v), _readable(do)
    o = o.transpose(1, 2).contiguous()  # already so, unless someone copied it on the way
    (b, h, n, d), e = q.shape, v.shape[-1]
    rows = score_rows(max(d, e))
    tiles = triton.cdiv(n, rows)
    wants_v, wants_qk = head_scores is not None or v_scores is not None, qk_scores is not None
    delta = q.new_empty(b, h, n, dtype=torch.float32)
    v_part = q.new_empty(b, h, tiles, e, dtype=torch.float32) if wants_v else None
    qk_part = q.new_empty(b, h, tiles, d, dtype=torch.float32) if wants_qk else None
    dq, dk, dv = (_by_token(b, h, n, dim, q) for dim in (d, d, e))
    bias_part = q.new_empty(bias_splits(b, h, n) if wants_bias else 0, h, n, n, dtype=torch.float32)
    shared = dict(
        q=q, k=k, v=v, do=do, stats=stats, delta=delta, scale=scale, **_strides8("do", do), **FUSED_MULTIPLY_ADD,
        **_shared(q, v, heads, heads_n, qk_mask, v_mask, bias, mask),
    )  # fmt: skip
    with on_device(q):
        delta_kernel[(tiles, h, b)](
            o=o, do=do, delta=delta, v_part=v_part, heads=heads, heads_n=heads_n, H=h, N=n, V8=e // 8,
            **_strides8("do", do), BLOCK_V=shared["BLOCK_V"], BLOCK_M=rows, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
        dq_tuned[(tiles, h, b)](dq=dq, qk_part=qk_part, BLOCK_M=rows, **shared)
        dkv_tuned[lambda m: (triton.cdiv(n, m["BLOCK_N"]), h, b)](dk=dk, dv=dv, **shared)
        if wants_bias:
            dbias_tuned[lambda m: (triton.cdiv(n, m["BLOCK_M"]) * triton.cdiv(n, m["BLOCK_N"]), h, len(bias_part))](
                bias_part=bias_part, B=b, **shared
            )
    if wants_v:
        _add(head_scores, v_part, (2, 3))
        _add(v_scores, v_part, (1, 2))
    if wants_qk:
        _add(qk_scores, qk_part, (1, 2))
    return dq, dk, dv, bias_part.sum(0) if wants_bias else bias_part.new_empty(0)


def _add(scores: Tensor | None, partial: Tensor, dims: tuple[int, int]) -> None:
    if scores is not None:
        scores += partial.sum(dims if scores.dim() == 2 else (0, *dims))


@_backward.register_fake
def _(do, q, k, v, o, stats, scale, heads, heads_n, qk_mask, v_mask, head_scores, qk_scores, v_scores, bias, mask,
      wants_bias):  # fmt: skip
    b, h, n, d = q.shape
    dbias = q.new_empty((h, n, n) if wants_bias else 0, dtype=torch.float32)
    return *(_by_token(b, h, n, dim, q) for dim in (d, d, v.shape[-1])), dbias


def _save(ctx, inputs, output):
    q, k, v, ctx.scale, *lists, bias, mask = inputs
    ctx.save_for_backward(q, k, v, *output, *lists[:4], bias, mask)
    ctx.set_materialize_grads(False)
    ctx.scores = lists[4:]  # written by the backward, so not among what autograd guards against writing


def _differentiate(ctx, do, _):
    q, k, v, o, stats, *lists, bias, mask = ctx.saved_tensors
    wants_bias = ctx.needs_input_grad[11]
    *grads, dbias = _backward(do, q, k, v, o, stats, ctx.scale, *lists, *ctx.scores, bias, mask, wants_bias)
    return *grads, *([None] * 8), dbias.to(bias.dtype) if wants_bias else None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def attention(q, k, v, scale, heads=None, qk=None, v_dim=None, head_scores=None, qk_scores=None, v_scores=None,
              bias=None, mask=None):  # fmt: skip
    """Fused `nvit_kernels.reference.attention`, which says what the arguments are."""
    lists = (None, None) if heads is None else (heads.index, heads.count)
    masks = (None if kept is None else kept.mask for kept in (qk, v_dim))
    return _forward(q, k, v, float(scale), *lists, *masks, head_scores, qk_scores, v_scores, bias, mask)[0]
