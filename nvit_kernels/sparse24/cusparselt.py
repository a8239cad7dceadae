"""cuSPARSELt's compressed form: one buffer, values first, metadata behind them.

How it orders the metadata is not documented and differs between GPUs. So a layout of ours is used only after it was
compared with `torch._cslt_compress`, byte for byte, once per device and dtype; where none agrees, torch compresses.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nvit_kernels.sparse24.compress import compress_2to4, fits_2to4, mask_2to4
from nvit_kernels.sparse24.plain import _meta_order

MULTIPLES = {torch.float16: 16, torch.bfloat16: 16, torch.int8: 32}
_TRIED = ((64, 128), (96, 384), (256, 128))


def compress_cusparselt(dense: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """The buffer that `torch._cslt_sparse_mm` reads, of `dense` pruned by magnitude or by `mask`.

    Args:
        dense: `(M, K)` on a CUDA device, as for `compress_2to4`; M and K multiples of 16, for int8 of 32.
        mask: bool `(M, K)`, at most two of each four True.
        dtype: float16 or bfloat16 values from float32 masters.

    Returns:
        One dimension: 9/16 of the elements for 16-bit values, 10/16 for int8.

    Raises:
        ValueError: a shape or dtype that does not fit, or a torch without cuSPARSELt.
    """
    to = dtype or dense.dtype
    multiple = MULTIPLES.get(to)
    if multiple is None:
        raise ValueError(f"compress_cusparselt: values would be {to}, expected float16, bfloat16 or int8.")
    if dense.dim() != 2 or any(n == 0 or n % multiple for n in dense.shape):
        raise ValueError(
            f"compress_cusparselt: shape {tuple(dense.shape)}, expected (M, K) in multiples of {multiple} for {to}."
        )
    if fits_2to4(dense.shape, to):
        layout = verified_layout(dense.device, to)
        if layout is not None:
            packed = compress_2to4(dense, mask, dtype=dtype)
            return assemble(packed.values, packed.meta, layout)
    kept = mask_2to4(dense) if mask is None else mask
    return _torch_compress(torch.where(kept, dense.detach(), dense.new_zeros(())).to(to).contiguous())


def assemble(values: Tensor, meta: Tensor, layout: str) -> Tensor:
    """Values and metadata of `compress_2to4` as one buffer, the metadata in one of `LAYOUTS`."""
    parts = (values.flatten().view(torch.uint8), LAYOUTS[layout](meta).flatten().view(torch.uint8))
    return torch.cat(parts).view(values.dtype)


def _row_by_row(meta: Tensor) -> Tensor:
    order = _meta_order(*meta.shape, meta.dtype == torch.int32, meta.device)
    return meta.flatten()[order]


LAYOUTS = {"as CUTLASS": lambda meta: meta, "row by row": _row_by_row}


@functools.cache
def verified_layout(device: torch.device, dtype: torch.dtype) -> str | None:
    """The layout that agrees with `torch._cslt_compress` on this device, or None."""
    agree = set(LAYOUTS)
    for i, shape in enumerate(_TRIED):
        generator = torch.Generator().manual_seed(i)
        dense = (torch.randn(shape, generator=generator) * 50).to(dtype).to(device)
        pruned = torch.where(mask_2to4(dense), dense, torch.zeros((), dtype=dtype, device=device))
        packed, theirs = compress_2to4(pruned), _torch_compress(pruned).flatten().view(torch.uint8)
        agree = {
            layout
            for layout in agree
            if torch.equal(assemble(packed.values, packed.meta, layout).view(torch.uint8), theirs)
        }
    return min(agree, default=None)


def _torch_compress(pruned: Tensor) -> Tensor:
    try:
        return torch._cslt_compress(pruned)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"compress_cusparselt: torch cannot compress on {pruned.device} ({reason}).") from None
