"""The second stage of sums over tokens: partial sums of tiles, folded in a fixed order, in one launch.

A first kernel leaves `part` `(samples, tiles, PLANES, width)` in float32, a row for every tile of a sample's tokens.
This one adds them up to at most two gradients `(width,)` and, where scores are collected, to a score for every unit of
every sample. No atomics: the same input gives the same bits.

Needed: one read of `part`, `4 · samples · tiles · PLANES · width` bytes, and one addition for each of its elements.
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl

from nvit_kernels.launch import INTERPRET, power_of_two
from nvit_kernels.tuning import Launch

ROWS, COLUMNS = (1024, 1024) if INTERPRET else (64, 32)  # of `part`, at a time


PROGRAMS = 512  # of a first stage, about: some for each processor of a large GPU, all at once


def chunk_rows(rows: int, across: int = 1, least: int = 8, most: int = 64) -> int:
    """Rows that a program of the first stage folds into one partial sum, a power of two and a matter of shapes alone.

    Args:
        rows: tokens of all samples.
        across: programs side by side over the width.
    """
    return max(least, min(most, power_of_two(rows * across // PROGRAMS, 1)))


def in_units(width: int) -> dict[str, int]:
    """A width as kernels take it: divided by 8 where it can be, so that loads stay wide."""
    unit = 1 if width % 8 else 8
    return dict(units=width // unit, UNIT=unit)


@triton.jit
def fold_kernel(
    part,  # (samples, tiles, PLANES, width) float32
    sum0,  # out: (width,), Σ of the first plane; None: not wanted
    sum1,  # out: (width,), Σ of the second plane
    weight0,  # (width,), factor of the first plane in the score; None: the score is the last plane alone
    weight1,  # (width,), factor of the second
    scores,  # in, out: (samples, width) or (width,) float32; None: none are wanted
    samples,
    row_tiles,  # of a sample
    width,
    each,  # width where scores are of each sample, 0 where they are of all together
    PLANES: tl.constexpr,
    SAMPLES: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program has some columns of every plane, SAMPLES · TILES rows at a time."""
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = col < width
    total0 = tl.zeros([COLUMNS], tl.float32)
    total1 = tl.zeros([COLUMNS], tl.float32)
    total_score = tl.zeros([COLUMNS], tl.float32)
    for s0 in range(0, samples, SAMPLES):
        sample = s0 + tl.arange(0, SAMPLES)
        first = tl.zeros([SAMPLES, COLUMNS], tl.float32)
        second = tl.zeros([SAMPLES, COLUMNS], tl.float32)
        last = tl.zeros([SAMPLES, COLUMNS], tl.float32)
        for t0 in range(0, row_tiles, TILES):
            tile = t0 + tl.arange(0, TILES)
            start = part + (tl.cast(s0, tl.int64) * row_tiles + t0) * (PLANES * width)
            row = tl.arange(0, SAMPLES)[:, None] * row_tiles + tl.arange(0, TILES)[None, :]
            there = ((sample < samples)[:, None] & (tile < row_tiles)[None, :])[:, :, None] & inside[None, None, :]
            at = start + row[:, :, None] * (PLANES * width) + col[None, None, :]
            first += tl.sum(tl.load(at, mask=there, other=0.0), 1)
            second += tl.sum(tl.load(at + width, mask=there, other=0.0), 1)
            if PLANES == 3:
                last += tl.sum(tl.load(at + 2 * width, mask=there, other=0.0), 1)
        if scores is not None:
            if weight0 is not None:
                score = first * tl.load(weight0 + col, mask=inside, other=0.0).to(tl.float32)[None, :]
                if weight1 is not None:
                    score += second * tl.load(weight1 + col, mask=inside, other=0.0).to(tl.float32)[None, :]
            else:
                score = last if PLANES == 3 else second
            if each > 0:
                place = scores + sample.to(tl.int64)[:, None] * each + col[None, :]
                mine = (sample < samples)[:, None] & inside[None, :]
                tl.store(place, tl.load(place, mask=mine, other=0.0) + score, mask=mine)
            total_score += tl.sum(score, 0)
        total0 += tl.sum(first, 0)
        total1 += tl.sum(second, 0)
    if sum0 is not None:
        tl.store(sum0 + col, total0.to(sum0.dtype.element_ty), mask=inside)
    if sum1 is not None:
        tl.store(sum1 + col, total1.to(sum1.dtype.element_ty), mask=inside)
    if scores is not None:  # noqa: SIM102  a constant, then an argument
        if each == 0:
            place = scores + col
            tl.store(place, tl.load(place, mask=inside, other=0.0) + total_score, mask=inside)


@lru_cache(maxsize=1024)
def fold(samples: int, tiles: int, planes: int, width: int, of_each: bool) -> Launch:
    """The launch that folds a `part` of this shape, to scores of each sample or of all; call it with the pointers."""
    at_once = min(power_of_two(tiles, 1), ROWS)
    return Launch(
        fold_kernel,
        (triton.cdiv(width, COLUMNS),),
        dict(
            samples=samples,
            row_tiles=tiles,
            width=width,
            each=width if of_each else 0,
            PLANES=planes,
            SAMPLES=min(power_of_two(samples, 1), ROWS // at_once),
            TILES=at_once,
            COLUMNS=min(COLUMNS, power_of_two(width)),
            num_warps=8,
        ),
    )
