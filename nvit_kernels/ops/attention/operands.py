"""What attention's kernels want of their operands: shapes and dtypes, readable layouts, rows filled up to eights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nvit_kernels.launch import check_list, eighths

LARGEST_HEAD = 256


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of samples, heads and tokens; those of a single head or token, which mean nothing, so that samples fit.

    The kernels take a sample to be as long as all its tokens or all its heads, whichever is more.
    """
    _, heads, tokens, _ = x.shape
    b, h, n, _ = x.stride()
    return b, 0 if heads == 1 else h, b if tokens == 1 else n


def readable(x: Tensor) -> Tensor:
    """`x` as it is where its rows are contiguous and 16-byte aligned and its samples end to end, else a copy."""
    batch, heads, tokens, _ = x.shape
    b, h, n = strides(x)
    aligned = x.stride(-1) == 1 and b % 8 == h % 8 == n % 8 == 0 and x.data_ptr() % 16 == 0
    return x if aligned and (batch == 1 or b == max(tokens * n, heads * h)) else x.contiguous()


def readable_alike(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Both readable, with the same strides."""
    q, k = readable(q), readable(k)
    return (q, k) if strides(q) == strides(k) else (q.contiguous(), k.contiguous())


def strides8(prefix: str, x: Tensor) -> dict[str, int]:
    """Strides of heads and tokens divided by 8, by the names that the kernels have for them."""
    _, h, n = strides(x)
    return {f"{prefix}_h8": h // 8, f"{prefix}_n8": n // 8}


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


def whole_rows(x: Tensor) -> Tensor:
    """`(·, tokens, tokens)` contiguous, with rows filled up to a multiple of 8 by -inf."""
    return F.pad(x, (0, -x.shape[-1] % 8), value=float("-inf")).contiguous() if x.shape[-1] % 8 else x.contiguous()
