"""2:4 sparsity: at most two nonzeros of each four neighbours, in the form sparse tensor cores read.

`compress_2to4` chooses the two largest of four and writes values, metadata and bitmask in one pass; the `_many` forms
do a whole model in one call. The compiled operators are used where they were built (CPU, CUDA), plain torch with the
same bytes elsewhere. Formats and rules: docs/sparse24.md.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nvit_kernels import _native
from nvit_kernels.sparse24 import plain


class Sparse24(NamedTuple):
    """A compressed `(M, K)` matrix.

    Attributes:
        values: `(M, K/2)`, the kept elements row by row.
        meta: positions of the kept elements in torch's CUTLASS order: int16 `(M, K/16)` for 16-bit values,
            int16 `(M, K/8)` for float32, int32 `(M, K/32)` for int8.
        bitmask: uint8 `(M, K/8)`, bit j of byte i set where element `8 i + j` is stored: two of each four
            (float32: one of two).
    """

    values: Tensor
    meta: Tensor
    bitmask: Tensor


# Of the values: row multiple, column multiple, group width, metadata dtype, elements a metadata word covers.
_FORMS = {
    torch.float16: (32, 64, 4, torch.int16, 16),
    torch.bfloat16: (32, 64, 4, torch.int16, 16),
    torch.float32: (32, 32, 2, torch.int16, 8),
    torch.int8: (16, 128, 4, torch.int32, 32),
}
_SCHEMAS = {
    "compress_2to4": "(Tensor[] dense, Tensor[] mask, ScalarType? dtype, bool check) -> (Tensor[], Tensor[], Tensor[])",
    "repack_2to4": "(Tensor[] dense, Tensor[] meta, ScalarType? dtype, bool check) -> Tensor[]",
    "decompress_2to4": "(Tensor[] values, Tensor[] meta, bool check) -> Tensor[]",
}
_IN_TORCH = {
    "compress_2to4": plain.compress,
    "repack_2to4": plain.repack,
    "decompress_2to4": plain.decompress,
}


def compress_2to4(
    dense: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype | None = None, check: bool = True
) -> Sparse24:
    """Keep the two largest of each four neighbours of `dense`, or what `mask` keeps, and pack them.

    Magnitudes are compared as bit patterns and the lower index wins a tie. A zero is kept only to fill a place; which
    place, is torch's choice, so that values and metadata equal those of its own conversion byte for byte. Hence the
    stored places need not be the mask's where the matrix holds zeros: finetune under the bitmask that comes back.
    `decompress_2to4(values, meta)` is `dense` where the bitmask is set and zero elsewhere.

    Args:
        dense: `(M, K)` float16, bfloat16, float32 or int8; rows may be strided. M and K must be multiples of
            (32, 64) for 16-bit values, (32, 32) for float32, (16, 128) for int8.
        mask: bool `(M, K)`, True stays, or uint8 `(M, K/8)` as the bitmask; at most two of each four.
        dtype: dtype of the values; float16 and bfloat16 from float32 masters, in the same pass. Chosen by the
            masters' magnitudes. By default the matrix's own; float32 values keep one of two.
        check: refuse NaN and a mask that is not 2:4. On a GPU that waits for the result; without it, NaN counts as
            the largest magnitude.

    Raises:
        ValueError: a shape, dtype or mask that does not fit, or NaN.
    """
    return compress_2to4_many([dense], None if mask is None else [mask], dtype=dtype, check=check)[0]


def compress_2to4_many(
    dense: Sequence[Tensor],
    mask: Sequence[Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    check: bool = True,
) -> list[Sparse24]:
    """`compress_2to4` for many matrices of one device in one call: one launch on a GPU, one parallel loop on a CPU."""
    dense = [d.detach() for d in dense]
    if mask is not None and len(mask) != len(dense):
        raise ValueError(f"compress_2to4: {len(dense)} matrices but {len(mask)} masks; give one for each.")
    for i, d in enumerate(dense):
        _check_dense("compress_2to4", i, d, dtype)
        if mask is not None:
            _check_mask(i, d, mask[i])
    if not dense:
        return []
    outputs = _call("compress_2to4", dense, [] if mask is None else list(mask), dtype, check)
    return [Sparse24(*each) for each in zip(*outputs, strict=True)]


def decompress_2to4(values: Tensor, meta: Tensor, *, check: bool = True) -> Tensor:
    """The dense `(M, K)` matrix of `values` and `meta`, zeros where nothing is stored.

    Raises:
        ValueError: shapes or dtypes that do not belong together, or metadata that is damaged.
    """
    form = _FORMS.get(values.dtype)
    if form is None:
        raise ValueError(f"decompress_2to4: values are {values.dtype}, expected one of {_names()}.")
    rows, columns = (values.shape[0], values.shape[1] * 2) if values.dim() == 2 else (0, 0)
    _check_shape("decompress_2to4: the dense matrix", (rows, columns), values.dtype)
    _check_meta("decompress_2to4", 0, meta, (rows, columns), values.dtype)
    return _call("decompress_2to4", [values.detach()], [meta], check)[0]


def repack_2to4(dense: Tensor, meta: Tensor, *, dtype: torch.dtype | None = None, check: bool = True) -> Tensor:
    """Values of `dense` at the places `meta` stores: what changes in a step of finetuning under a fixed mask.

    Args:
        dense: as for `compress_2to4`.
        meta: of `compress_2to4`; it stays valid, and so does the bitmask.
    """
    return repack_2to4_many([dense], [meta], dtype=dtype, check=check)[0]


def repack_2to4_many(
    dense: Sequence[Tensor], meta: Sequence[Tensor], *, dtype: torch.dtype | None = None, check: bool = True
) -> list[Tensor]:
    """`repack_2to4` for many matrices of one device in one call."""
    dense = [d.detach() for d in dense]
    if len(meta) != len(dense):
        raise ValueError(f"repack_2to4: {len(dense)} matrices but {len(meta)} metadata tensors; give one for each.")
    for i, (d, m) in enumerate(zip(dense, meta, strict=True)):
        _check_dense("repack_2to4", i, d, dtype)
        _check_meta("repack_2to4", i, m, d.shape, dtype or d.dtype)
    if not dense:
        return []
    return _call("repack_2to4", dense, list(meta), dtype, check)


def mask_2to4(weight: Tensor) -> Tensor:
    """The bool mask of the two largest of each four neighbours, for any matrix whose rows are a multiple of 4 long.

    The choice is `compress_2to4`'s for 16-bit values; shapes that it refuses are welcome here.
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        raise ValueError(f"mask_2to4: shape {tuple(weight.shape)}, expected a matrix with rows a multiple of 4 long.")
    magnitudes = plain._magnitudes(weight.detach())
    return plain._largest(magnitudes.unflatten(1, (-1, 4))).flatten(1)


def fits_2to4(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether `compress_2to4` takes a matrix of this shape with values of this dtype."""
    form = _FORMS.get(dtype)
    return form is not None and len(shape) == 2 and all(n > 0 and n % m == 0 for n, m in zip(shape, form, strict=False))


def _call(name: str, *args):
    """Run an operator."""
    tensors = args[0]
    if len({t.device for t in (*args[0], *args[1])}) > 1:
        raise ValueError(
            f"{name}: tensors on {sorted({str(t.device) for t in (*args[0], *args[1])})}; put them on one."
        )
    if not torch.compiler.is_compiling():
        _say_if_slow(tensors[0].device.type)
    with named_error(name):
        return getattr(torch.ops.nvit, name).default(*args)


@contextlib.contextmanager
def named_error(name: str) -> Iterator[None]:
    """A refusal of compiled code reaches the user as the one line it is."""
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith(f"{name}: "):
            raise ValueError(str(error).splitlines()[0]) from None
        raise


@functools.cache
def _say_if_slow(device: str) -> None:
    native = _native.load()
    why = {"cpu": native.why_not_cpu, "cuda": native.why_not_cuda}.get(device, "")
    if why:
        warnings.warn(f"2:4 compression runs in plain torch, slower with the same result: {why}.", stacklevel=5)


def _names() -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in _FORMS)


def _check_shape(what: str, shape: Sequence[int], values: torch.dtype) -> None:
    rows, columns = _FORMS[values][:2]
    if len(shape) != 2 or shape[0] == 0 or shape[1] == 0 or shape[0] % rows or shape[1] % columns:
        raise ValueError(
            f"{what} has shape {tuple(shape)}, expected (M, K) with M a multiple of {rows} and K of {columns} for "
            f"{str(values).removeprefix('torch.')} values. Pad with zeros, or keep this layer dense."
        )


def _check_dense(op: str, i: int, dense: Tensor, dtype: torch.dtype | None) -> None:
    to = dtype or dense.dtype
    narrowed = dense.dtype == torch.float32 and to in (torch.float16, torch.bfloat16)
    if dense.dtype not in _FORMS or not (to == dense.dtype or narrowed):
        asked = "" if to == dense.dtype else f" to {to}"
        raise ValueError(
            f"{op}: matrix {i} is {dense.dtype}{asked}, expected one of {_names()} as it is, or float32 to float16 or "
            "bfloat16."
        )
    _check_shape(f"{op}: matrix {i}", dense.shape, to)


def _check_mask(i: int, dense: Tensor, mask: Tensor) -> None:
    rows, columns = dense.shape
    expected = {torch.bool: (rows, columns), torch.uint8: (rows, columns // 8)}.get(mask.dtype)
    if expected != tuple(mask.shape):
        raise ValueError(
            f"compress_2to4: mask {i} is {mask.dtype} {tuple(mask.shape)}, expected torch.bool {(rows, columns)} or "
            f"torch.uint8 {(rows, columns // 8)} to match the matrix."
        )


def _check_meta(op: str, i: int, meta: Tensor, shape: Sequence[int], values: torch.dtype) -> None:
    _, _, _, dtype, covers = _FORMS[values]
    expected = (shape[0], shape[1] // covers)
    if meta.dtype != dtype or tuple(meta.shape) != expected:
        raise ValueError(
            f"{op}: metadata {i} is {meta.dtype} {tuple(meta.shape)}, expected {dtype} {expected} for a "
            f"{tuple(shape)} matrix of {values}."
        )


def _fake_compress(dense, mask, dtype, check):
    outputs = [[], [], []]
    for d in dense:
        rows, columns = d.shape
        values = dtype or d.dtype
        _, _, _, meta, covers = _FORMS[values]
        outputs[0].append(d.new_empty((rows, columns // 2), dtype=values))
        outputs[1].append(d.new_empty((rows, columns // covers), dtype=meta))
        outputs[2].append(d.new_empty((rows, columns // 8), dtype=torch.uint8))
    return tuple(outputs)


def _fake_repack(dense, meta, dtype, check):
    return [d.new_empty((d.shape[0], d.shape[1] // 2), dtype=dtype or d.dtype) for d in dense]


def _fake_decompress(values, meta, check):
    return [v.new_empty((v.shape[0], v.shape[1] * 2)) for v in values]


def _register() -> torch.library.Library:
    """Shapes for torch.compile, and plain torch behind every operator that has no compiled code here."""
    native = _native.load()
    library = torch.library.Library("nvit", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not native.cpu:
            library.define(name + schema)
            library.impl(name, _IN_TORCH[name], "CPU")
        if not native.cuda:
            library.impl(name, _IN_TORCH[name], "CUDA")
    fakes = {"compress_2to4": _fake_compress, "repack_2to4": _fake_repack, "decompress_2to4": _fake_decompress}
    for name, fake in fakes.items():
        torch.library.register_fake(f"nvit::{name}", fake, lib=library)
    return library


_library = _register()  # operators live as long as this does
