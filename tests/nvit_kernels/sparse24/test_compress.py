"""Compression against torch's own semi-structured conversions and a brute-force choice, byte for byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as torch_compress,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_to_dense_cutlass as torch_decompress,
)

from nvit_kernels import _native, sparse24
from nvit_kernels.sparse24 import plain

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.int8]
MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.float32: (32, 32), torch.int8: (16, 128)}
KINDS = ("normal", "ties", "sparse", "zeros", "denormal", "huge", "raw")


class InTorch:
    """The operators of the plain-torch path, under the names of the public ones."""

    @staticmethod
    def compress_2to4(dense, mask=None, *, dtype=None, check=True):
        outputs = plain.compress([dense], [] if mask is None else [mask], dtype, check)
        return sparse24.Sparse24(*(column[0] for column in outputs))

    @staticmethod
    def decompress_2to4(values, meta):
        return plain.decompress([values], [meta], True)[0]

    @staticmethod
    def repack_2to4(dense, meta, *, dtype=None):
        return plain.repack([dense], [meta], dtype, True)[0]


@pytest.fixture(params=["compiled", "torch"], scope="module")
def ops(request):
    if request.param == "torch":
        return InTorch
    if not _native.load().cpu:
        pytest.skip(_native.load().why_not_cpu)
    return sparse24


def matrix(kind: str, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values of one kind; `raw` are random bit patterns: every exponent, infinities, denormals, both zeros, no NaN."""
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        low, high = (-2, 3) if kind in ("ties", "sparse", "zeros") else (-128, 128)
        return torch.randint(low, high, shape, generator=g, dtype=torch.int8)
    if kind == "raw":
        wide = torch.int32 if dtype == torch.float32 else torch.int16
        info = torch.iinfo(wide)
        x = torch.randint(info.min, info.max + 1, shape, generator=g, dtype=torch.int64).to(wide).view(dtype)
        return torch.where(x.isnan(), torch.full_like(x, float("-inf")), x)
    x = torch.randn(shape, generator=g)
    if kind == "ties":
        x = x.round()  # -0 among them
    elif kind == "sparse":
        x = x * (torch.rand(shape, generator=g) < 0.3)  # multiplying leaves -0
    elif kind == "zeros":
        x = torch.where(x < 0, -0.0, 0.0) + (x > 2.5)
    elif kind == "denormal":
        x = x * torch.finfo(dtype).tiny * 0.3
    elif kind == "huge":
        x = torch.where(x > 1, torch.inf, torch.where(x < -1, -torch.inf, x * 1e4))
    return x.to(dtype)


def raw(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def assert_same_bytes(ours, reference):
    assert ours.shape == reference.shape and ours.dtype == reference.dtype
    torch.testing.assert_close(raw(ours), raw(reference), rtol=0, atol=0)


def stored(compressed) -> torch.Tensor:
    return sparse24.unpack_bits(compressed.bitmask)


def brute_force_choice(x: torch.Tensor, width: int) -> torch.Tensor:
    """The larger half of each group by Python's own sort of the sign-less bit patterns; the lower index first."""
    if x.dtype == torch.int8:
        bits = x.int().abs()
    elif x.dtype == torch.float32:
        bits = x.contiguous().view(torch.int32) & 0x7FFFFFFF
    else:
        bits = x.contiguous().view(torch.int16) & 0x7FFF
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    for start, group in enumerate(bits.reshape(-1, width).tolist()):
        for i in sorted(range(width), key=lambda i: -group[i])[: width // 2]:
            mask[start * width + i] = True
    return mask.view(x.shape)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 5))
everything = dict(
    blocks=shapes,
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
    view=st.sampled_from(["whole", "strided", "transposed", "offset"]),
)


def build(blocks, dtype, kind, seed, view):
    m, k = (b * n for b, n in zip(blocks, MULTIPLES[dtype], strict=True))
    if view == "transposed":
        return matrix(kind, (k, m), dtype, seed).t()
    if view == "offset":  # contiguous, but not aligned to more than an element
        return matrix(kind, (m + 1, k), dtype, seed).flatten()[1 : 1 + m * k].view(m, k)
    if view == "strided":
        return matrix(kind, (2 * m, k + 3), dtype, seed)[::2, 1 : k + 1]
    return matrix(kind, (m, k), dtype, seed)


@settings(max_examples=150, deadline=None)
@given(**everything)
def test_equals_torch_conversion_byte_for_byte(ops, blocks, dtype, kind, seed, view):
    x = build(blocks, dtype, kind, seed, view)
    ours = ops.compress_2to4(x)
    masked = torch.where(stored(ours), x, torch.zeros((), dtype=dtype)).contiguous()
    values, meta = torch_compress(masked)
    assert_same_bytes(ours.values, values)
    assert_same_bytes(ours.meta, meta)
    dense = ops.decompress_2to4(ours.values, ours.meta)
    assert_same_bytes(dense, masked)
    if dtype != torch.float32:  # torch moves float32 as pairs of halves and alters halves that look like a NaN
        assert_same_bytes(dense, torch_decompress(values, meta))
    assert_same_bytes(ops.repack_2to4(x, ours.meta), values)


@settings(max_examples=30, deadline=None)
@given(**everything)
def test_keeps_the_two_largest(ops, blocks, dtype, kind, seed, view):
    x = build(blocks, dtype, kind, seed, view)
    width = 2 if dtype == torch.float32 else 4
    places = stored(ops.compress_2to4(x))
    assert (places.unflatten(1, (-1, width)).sum(2) == width // 2).all()
    chosen = brute_force_choice(x, width)
    assert not (chosen & (x != 0) & ~places).any(), "a chosen nonzero is not stored"
    assert not ((x != 0) & places & ~chosen).any(), "a nonzero that was not chosen is stored"


@settings(max_examples=60, deadline=None)
@given(
    blocks=shapes,
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_master_weights_narrow_in_the_same_pass(ops, blocks, kind, seed, dtype):
    x = build(blocks, torch.float32, kind, seed, "whole").repeat(1, 2)
    ours = ops.compress_2to4(x, dtype=dtype)
    rounded = x.to(dtype)
    masked = torch.where(stored(ours), rounded, torch.zeros((), dtype=dtype))
    values, meta = torch_compress(masked)
    assert_same_bytes(ours.values, values)
    assert_same_bytes(ours.meta, meta)
    assert_same_bytes(ops.repack_2to4(x, ours.meta, dtype=dtype), values)
    chosen = brute_force_choice(x, 4)  # by the masters: two that round to one value are still told apart
    assert not (chosen & (rounded != 0) & ~stored(ours)).any()


@settings(max_examples=60, deadline=None)
@given(**everything, packed=st.booleans())
def test_packs_a_given_mask(ops, blocks, dtype, kind, seed, view, packed):
    x = build(blocks, dtype, kind, seed, view)
    width = 2 if dtype == torch.float32 else 4
    noise = matrix("normal", tuple(x.shape), torch.float32, seed + 1)
    mask = plain._largest(noise.abs().unflatten(1, (-1, width))).flatten(1)
    mask &= noise < 1  # groups with one or none kept as well
    ours = ops.compress_2to4(x, sparse24.pack_bits(mask) if packed else mask)
    masked = torch.where(mask, x, torch.zeros((), dtype=dtype)).contiguous()
    values, meta = torch_compress(masked)
    assert_same_bytes(ours.values, values)
    assert_same_bytes(ours.meta, meta)
    assert torch.equal(ops.decompress_2to4(ours.values, ours.meta), masked)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_matrix(ops, dtype):
    x = matrix("normal", (4096, 4096), dtype, 0)
    ours = ops.compress_2to4(x)
    values, meta = torch_compress(torch.where(stored(ours), x, torch.zeros((), dtype=dtype)))
    assert_same_bytes(ours.values, values)
    assert_same_bytes(ours.meta, meta)


@pytest.mark.parametrize("shape", [(32, 1088), (96, 3136), (800, 64), (2048, 4160)])
def test_ragged_against_work_units(ops, shape):
    x = matrix("normal", shape, torch.bfloat16, 3)  # columns that end inside a 1024-wide or 256-wide unit
    ours = ops.compress_2to4(x)
    values, meta = torch_compress(torch.where(stored(ours), x, 0.0).bfloat16())
    assert_same_bytes(ours.values, values)
    assert_same_bytes(ours.meta, meta)


def test_bitmask_is_a_fixed_point(ops):
    x = matrix("normal", (64, 256), torch.float16, 1)
    first = ops.compress_2to4(x)
    again = ops.compress_2to4(x, first.bitmask)
    for a, b in zip(first, again, strict=True):
        assert_same_bytes(a, b)


def test_finetuning_step_under_a_fixed_mask(ops):
    x = matrix("sparse", (64, 256), torch.float32, 2)
    packed = ops.compress_2to4(x, dtype=torch.float16)
    x = torch.where(stored(packed), x + 0.25, 0.0)  # a step moves zeros too, where they are stored
    values = ops.repack_2to4(x, packed.meta, dtype=torch.float16)
    assert torch.equal(ops.decompress_2to4(values, packed.meta), x.half())


def test_many_equals_one_by_one():
    shapes = [(32, 64), (768, 768), (192, 576), (3072, 768), (32, 1088)]
    dense = [matrix("normal", s, torch.float32, i) for i, s in enumerate(shapes)]
    many = sparse24.compress_2to4_many(dense, dtype=torch.float16)
    for x, packed in zip(dense, many, strict=True):
        for a, b in zip(packed, sparse24.compress_2to4(x, dtype=torch.float16), strict=True):
            assert_same_bytes(a, b)
    repacked = sparse24.repack_2to4_many(dense, [p.meta for p in many], dtype=torch.float16)
    for packed, values in zip(many, repacked, strict=True):
        assert_same_bytes(values, packed.values)
    assert sparse24.compress_2to4_many([]) == []


def test_mask_is_the_choice_of_compress():
    x = matrix("normal", (64, 128), torch.float32, 5)
    mask = sparse24.mask_2to4(x)
    assert torch.equal(mask, stored(sparse24.compress_2to4(x, dtype=torch.bfloat16)))
    assert sparse24.mask_2to4(x[:5, :12]).sum() == 5 * 12 // 2


def test_parameters_and_gradients_are_left_alone():
    weight = torch.nn.Parameter(matrix("normal", (32, 64), torch.float32, 0))
    packed = sparse24.compress_2to4(weight, dtype=torch.float16)
    assert not packed.values.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_equals_cpu(dtype, kind):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not _native.load().cuda:
        pytest.skip(_native.load().why_not_cuda)
    shapes = [(32, 128), (96, 384), (768, 3072), (4096, 1152)]
    dense = [matrix(kind, s, dtype, i) for i, s in enumerate(shapes)]
    on_gpu = [d.cuda() for d in dense]
    for ours, theirs in zip(sparse24.compress_2to4_many(on_gpu), sparse24.compress_2to4_many(dense), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_same_bytes(a.cpu(), b)
    x, packed = on_gpu[1], sparse24.compress_2to4(on_gpu[1])
    masked = torch.where(sparse24.unpack_bits(packed.bitmask), x, torch.zeros((), dtype=dtype, device="cuda"))
    assert_same_bytes(sparse24.decompress_2to4(packed.values, packed.meta), masked)
    assert_same_bytes(sparse24.repack_2to4(x, packed.meta), packed.values)
    with_mask = sparse24.compress_2to4(x, sparse24.unpack_bits(packed.bitmask))
    for a, b in zip(with_mask, packed, strict=True):
        assert_same_bytes(a, b)
    if dtype == torch.float32:
        for narrow in (torch.float16, torch.bfloat16):
            for a, b in zip(
                sparse24.compress_2to4(x, dtype=narrow), sparse24.compress_2to4(dense[1], dtype=narrow), strict=True
            ):
                assert_same_bytes(a.cpu(), b)


def test_a_double_has_the_mask_of_its_magnitudes():
    weight = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = sparse24.mask_2to4(weight)
    assert mask.shape == weight.shape and torch.equal(mask, sparse24.mask_2to4(weight.float()))
