"""The GPU's tile code, run thread after thread on the host, against the CPU's own kernels: byte for byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvit_kernels import _native, sparse24

pytestmark = pytest.mark.skipif(not _native.load().cpu, reason=_native.load().why_not_cpu or "compiled")

MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.float32: (32, 32), torch.int8: (16, 128)}
CONVERSIONS = [
    (torch.float16, None),
    (torch.bfloat16, None),
    (torch.float32, None),
    (torch.int8, None),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
]


def matrix(shape, dtype, seed):
    """Random bit patterns with zeros strewn in; NaN made infinite."""
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        x = torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)
    else:
        wide = torch.int32 if dtype == torch.float32 else torch.int16
        x = torch.randint(-(2**31), 2**31, shape, generator=g, dtype=torch.int64).to(wide).view(dtype)
        x = torch.where(x.isnan(), torch.full_like(x, float("inf")), x)
    return torch.where(torch.rand(shape, generator=g) < 0.3, torch.zeros((), dtype=dtype), x)


def same_bytes(ours, reference):
    assert len(ours) == len(reference)
    for a, b in zip(ours, reference, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a.view(torch.uint8), b.view(torch.uint8), rtol=0, atol=0)


@st.composite
def work(draw):
    """A few matrices whose sides end inside, at and beyond a tile of 32 x 256."""
    conversion = draw(st.sampled_from(CONVERSIONS))
    rows, columns = MULTIPLES[conversion[1] or conversion[0]]
    shapes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=3))
    seed = draw(st.integers(0, 2**31))
    dense = [matrix((m * rows, k * columns), conversion[0], seed + i) for i, (m, k) in enumerate(shapes)]
    if draw(st.booleans()):  # rows a fixed distance apart
        dense = [torch.cat((d, d), 1)[:, : d.shape[1]] for d in dense]
    return dense, conversion[1]


@settings(max_examples=120, deadline=None)
@given(work(), st.sampled_from(["choose", "bool mask", "packed mask"]))
def test_compress(case, how):
    dense, dtype = case
    plain = torch.ops.nvit.compress_2to4(dense, [], dtype, True)
    mask = [] if how == "choose" else plain[2]
    if how == "bool mask":
        mask = [sparse24.unpack_bits(m) for m in mask]
    reference = torch.ops.nvit.compress_2to4(dense, mask, dtype, True)
    tiles = torch.ops.nvit._compress_2to4_tiles(dense, mask, dtype, True)
    for ours, theirs in zip(tiles, reference, strict=True):
        same_bytes(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(work())
def test_repack_and_decompress(case):
    dense, dtype = case
    values, meta, _ = torch.ops.nvit.compress_2to4(dense, [], dtype, True)
    same_bytes(torch.ops.nvit._repack_2to4_tiles(dense, meta, dtype, True), values)
    same_bytes(
        torch.ops.nvit._decompress_2to4_tiles(values, meta, True), torch.ops.nvit.decompress_2to4(values, meta, True)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_rounded_as_torch_rounds(dtype):
    """All exponents and the ties between neighbours, through the conversion the tiles and the CPU share."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    lower = torch.tensor([0x0000, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (upper[:, None] | lower).flatten()
    x = torch.where(x >= 2**31, x - 2**32, x).to(torch.int32).view(torch.float32)
    x = torch.where(x.isnan(), 1.0, x)
    wide = torch.zeros(x.numel() // 64, 128)
    wide.view(-1, 4)[:, 1::2] = x.view(-1, 2)  # two of four, so all are kept
    mask = torch.tensor([False, True]).repeat(wide.shape[0], 64)
    packed = sparse24.compress_2to4(wide, mask, dtype=dtype)
    dense = sparse24.decompress_2to4(packed.values, packed.meta)
    kept = wide.to(dtype)
    assert torch.equal(dense, kept)
    nonzero = kept != 0
    same_bytes([dense[nonzero]], [kept[nonzero]])


def test_faults_are_reported_for_the_right_matrix():
    good, bad = matrix((64, 256), torch.float16, 0), matrix((64, 256), torch.float16, 1)
    bad[63, 255] = float("nan")
    with pytest.raises((RuntimeError, ValueError), match="matrix 1 holds NaN"):
        torch.ops.nvit._compress_2to4_tiles([good, bad], [], None, True)
    three = torch.tensor([True, True, True, False]).repeat(64, 64)
    with pytest.raises((RuntimeError, ValueError), match="matrix 0 has a mask that is not 2:4"):
        torch.ops.nvit._compress_2to4_tiles([good], [three], None, True)
    with pytest.raises((RuntimeError, ValueError), match="metadata that is not 2:4"):
        torch.ops.nvit._decompress_2to4_tiles([good[:, :128].contiguous()], [torch.zeros(64, 16).short()], True)
