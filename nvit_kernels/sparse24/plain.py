"""The 2:4 operators in plain torch: the same bytes as the compiled ones, slower, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def compress(dense: list[Tensor], mask: list[Tensor], dtype, check: bool):
    outputs = [_compress(i, d, mask[i] if mask else None, dtype, check) for i, d in enumerate(dense)]
    return tuple(list(column) for column in zip(*outputs, strict=True)) if outputs else ([], [], [])


def repack(dense: list[Tensor], meta: list[Tensor], dtype, check: bool) -> list[Tensor]:
    out = []
    for i, (d, m) in enumerate(zip(dense, meta, strict=True)):
        _refuse_nan("repack_2to4", i, d, check)
        kept = _kept_positions("repack_2to4", i, m, d.shape, check)
        out.append(_gather(d.to(dtype or d.dtype), kept))
    return out


def decompress(values: list[Tensor], meta: list[Tensor], check: bool) -> list[Tensor]:
    out = []
    for i, (v, m) in enumerate(zip(values, meta, strict=True)):
        width = 2 if v.dtype == torch.float32 else 4
        shape = (v.shape[0], v.shape[1] * 2)
        kept = _kept_positions("decompress_2to4", i, m, shape, check)
        groups = v.new_zeros(v.shape[0], shape[1] // width, width)
        groups.scatter_(2, kept, v.reshape(*kept.shape))
        out.append(groups.reshape(shape))
    return out


def _compress(i: int, dense: Tensor, mask: Tensor | None, dtype, check: bool) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_nan("compress_2to4", i, dense, check)
    values = dense.to(dtype or dense.dtype)
    width = 2 if values.dtype == torch.float32 else 4
    if mask is None:
        chosen = _largest(_magnitudes(dense).unflatten(1, (-1, width)))
    else:
        chosen = (unpack_bits(mask) if mask.dtype == torch.uint8 else mask).unflatten(1, (-1, width))
        if check and (chosen.sum(2) > width // 2).any():
            raise ValueError(
                f"compress_2to4: matrix {i} has a mask that is not 2:4: at most 2 of each 4 neighbours may stay "
                "(float32: 1 of 2)."
            )
        values = torch.where(chosen.flatten(1), values, values.new_zeros(()))
    kept = _stored_positions(chosen & (_magnitudes(values) != 0).unflatten(1, (-1, width)))
    stored = torch.zeros_like(chosen).scatter_(2, kept, True)
    return _gather(values, kept), _pack_meta(kept, values.dtype), pack_bits(stored.flatten(1))


def _magnitudes(x: Tensor) -> Tensor:
    """Bit patterns without the sign, ordered as the magnitudes are; int8's as int16, where 128 fits."""
    if x.dtype == torch.int8:
        return x.to(torch.int16).abs()
    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    return x.contiguous().view(wide) & torch.iinfo(wide).max


def _refuse_nan(op: str, i: int, x: Tensor, check: bool) -> None:
    if check and x.dtype in _FLOATS and x.isnan().any():
        raise ValueError(
            f"{op}: matrix {i} holds NaN, which has no place among magnitudes. Find the step that made it."
        )


def _largest(magnitudes: Tensor) -> Tensor:
    """True for the larger half of each group; the lower index wins a tie (the sort is stable)."""
    order = magnitudes.argsort(dim=2, descending=True, stable=True)[..., : magnitudes.shape[2] // 2]
    return torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(2, order, True)


def _stored_positions(nonzero: Tensor) -> Tensor:
    """The places stored for each group's nonzeros, ascending; the free places go where torch's conversion puts them."""
    if nonzero.shape[2] == 2:
        return (~nonzero[..., :1]).long()
    e0, e1, _, e3 = nonzero.unbind(2)
    first = torch.where(e0, 0, torch.where(e1, 1, 2))
    second = torch.where(e0 & e1, 1, torch.where(e3 | ~(e0 | e1), 3, 2))
    return torch.stack((first, second), 2)


def _gather(values: Tensor, kept: Tensor) -> Tensor:
    groups = values.unflatten(1, (kept.shape[1], -1))
    return groups.gather(2, kept).flatten(1).contiguous()


def _meta_order(rows: int, words: int, wide: bool, device) -> Tensor:
    """For each metadata word of a row-major matrix, its place in memory (`docs/sparse24.md` draws it)."""
    r, c = torch.arange(rows, device=device)[:, None], torch.arange(words, device=device)[None, :]
    block_rows = 16 if wide else 32
    inside = (r >> 3 & 1) | (c & 1) << 1
    inside = inside | (r & 7) << 2 if wide else inside | (r >> 4 & 1) << 2 | (r & 7) << 3
    return ((c >> 1) * (rows // block_rows) + r // block_rows) * (block_rows * 2) + inside


def _pack_meta(kept: Tensor, dtype: torch.dtype) -> Tensor:
    nibbles = kept[..., 0] | kept[..., 1] << 2 if kept.shape[2] == 2 else torch.where(kept[..., 0] == 0, 4, 14)
    wide = dtype == torch.int8
    nibbles = nibbles.unflatten(1, (-1, 8 if wide else 4))
    words = sum(nibbles[..., i] << 4 * i for i in range(nibbles.shape[2]))
    bits = 32 if wide else 16
    words = torch.where(words >= 1 << bits - 1, words - (1 << bits), words).to(torch.int32 if wide else torch.int16)
    order = _meta_order(*words.shape, wide, words.device)
    return torch.empty_like(words).flatten().scatter_(0, order.flatten(), words.flatten()).view(words.shape)


def _kept_positions(op: str, i: int, meta: Tensor, shape, check: bool) -> Tensor:
    """`_pack_meta` undone."""
    wide = meta.dtype == torch.int32
    words = meta.flatten()[_meta_order(*meta.shape, wide, meta.device)].long()
    nibbles = torch.stack([words >> 4 * k & 15 for k in range(8 if wide else 4)], 2).flatten(1)
    pairs = nibbles.shape[1] * 2 == shape[1]
    allowed = nibbles.new_tensor([4, 14] if pairs else [4, 8, 9, 12, 13, 14])
    if check and not torch.isin(nibbles, allowed).all():
        raise ValueError(f"{op}: matrix {i} has metadata that is not 2:4: it is damaged, or of another layout.")
    return (nibbles != 4).long()[..., None] if pairs else torch.stack((nibbles & 3, nibbles >> 2), 2)


def pack_bits(mask: Tensor) -> Tensor:
    """A bool matrix as bytes of eight neighbours, the first in the lowest bit."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (mask.unflatten(1, (-1, 8)) * weights).sum(2, dtype=torch.uint8)


def unpack_bits(bits: Tensor) -> Tensor:
    """`pack_bits` undone."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[..., None] >> shifts & 1).bool().flatten(1)
