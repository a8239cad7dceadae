"""Bad input, torch.compile, and what happens where nothing was compiled."""

import subprocess
import sys
import textwrap

import pytest
import torch

from nvit_kernels import _native, sparse24
from nvit_kernels.sparse24.compress import _SCHEMAS

NAN = float("nan")
COMPILED_ONLY = pytest.mark.skipif(not _native.load().cpu, reason=_native.load().why_not_cpu or "compiled")


def half(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()


REFUSED = {
    "rows": (lambda: sparse24.compress_2to4(half(31, 64)), "M a multiple of 32 and K of 64 for float16"),
    "columns": (lambda: sparse24.compress_2to4(half(32, 96)), "M a multiple of 32 and K of 64 for float16"),
    "empty": (lambda: sparse24.compress_2to4(half(0, 64)), "has shape (0, 64), expected (M, K)"),
    "three dimensions": (lambda: sparse24.compress_2to4(half(2, 32, 64)), "has shape (2, 32, 64), expected (M, K)"),
    "float64": (lambda: sparse24.compress_2to4(half(32, 64).double()), "torch.float64, expected one of float16"),
    "widening": (lambda: sparse24.compress_2to4(half(32, 64), dtype=torch.float32), "torch.float16 to torch.float32"),
    "NaN": (lambda: sparse24.compress_2to4(torch.full((32, 64), NAN)), "matrix 0 holds NaN"),
    "NaN in one of many": (
        lambda: sparse24.compress_2to4_many([half(32, 64), half(32, 64) * NAN]),
        "matrix 1 holds NaN",
    ),
    "NaN on repacking": (
        lambda: sparse24.repack_2to4(half(32, 64) * NAN, sparse24.compress_2to4(half(32, 64)).meta),
        "holds NaN",
    ),
    "mask with three of four": (
        lambda: sparse24.compress_2to4(half(32, 64), torch.tensor([True, True, True, False]).repeat(32, 16)),
        "mask that is not 2:4",
    ),
    "packed mask with four of four": (
        lambda: sparse24.compress_2to4(half(32, 64), torch.full((32, 8), 255, dtype=torch.uint8)),
        "mask that is not 2:4",
    ),
    "float32 mask with two of two": (
        lambda: sparse24.compress_2to4(half(32, 64).float(), torch.ones(32, 64, dtype=torch.bool)),
        "mask that is not 2:4",
    ),
    "mask of another shape": (
        lambda: sparse24.compress_2to4(half(32, 64), torch.ones(32, 32, dtype=torch.bool)),
        "expected torch.bool (32, 64) or torch.uint8 (32, 8)",
    ),
    "mask of another dtype": (
        lambda: sparse24.compress_2to4(half(32, 64), torch.ones(32, 64)),
        "mask 0 is torch.float32 (32, 64)",
    ),
    "fewer masks than matrices": (
        lambda: sparse24.compress_2to4_many([half(32, 64)] * 2, [half(32, 64) > 0]),
        "2 matrices but 1 masks",
    ),
    "damaged metadata": (
        lambda: sparse24.decompress_2to4(half(32, 32), torch.zeros(32, 4, dtype=torch.int16)),
        "metadata that is not 2:4",
    ),
    "metadata of another dtype": (
        lambda: sparse24.decompress_2to4(half(32, 32), torch.zeros(32, 4, dtype=torch.int32)),
        "expected torch.int16 (32, 4)",
    ),
    "metadata of another shape": (
        lambda: sparse24.repack_2to4(half(32, 128), sparse24.compress_2to4(half(32, 64)).meta),
        "expected torch.int16 (32, 8)",
    ),
    "values of another dtype": (
        lambda: sparse24.decompress_2to4(half(32, 32).double(), torch.zeros(32, 4, dtype=torch.int16)),
        "values are torch.float64",
    ),
    "mask_2to4 of a ragged row": (lambda: sparse24.mask_2to4(half(4, 6)), "rows a multiple of 4 long"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case):
    attempt, words = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        attempt()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unchecked_nan_counts_as_largest():
    x = half(32, 64)
    x[0, 2] = NAN
    packed = sparse24.compress_2to4(x, check=False)
    assert packed.values[0].isnan().sum() == 1
    assert sparse24.decompress_2to4(packed.values, packed.meta)[0, 2].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_operators_keep_torchs_contract(dtype):
    x = half(32, 128).to(dtype)
    packed = sparse24.compress_2to4(x)
    for op, args in [
        (torch.ops.nvit.compress_2to4, ([x, x.t().contiguous().t()], [], None, True)),
        (torch.ops.nvit.compress_2to4, ([x], [packed.bitmask], None, True)),
        (torch.ops.nvit.repack_2to4, ([x], [packed.meta], None, True)),
        (torch.ops.nvit.decompress_2to4, ([packed.values], [packed.meta], True)),
    ]:
        torch.library.opcheck(op.default, args)


def test_compiles_as_one_graph():
    def step(x):
        packed = sparse24.compress_2to4(x * 2, dtype=torch.float16)
        return packed, sparse24.decompress_2to4(packed.values, packed.meta)

    x = half(32, 128).float()
    (packed, dense), (expected, expected_dense) = torch.compile(step, fullgraph=True)(x), step(x)
    for a, b in zip((*packed, dense), (*expected, expected_dense), strict=True):
        assert torch.equal(a, b)


@COMPILED_ONLY
def test_one_schema_for_both_paths():
    for name, schema in _SCHEMAS.items():
        defined = getattr(torch.ops.nvit, name).default._schema
        written = torch._C.parse_schema(f"nvit::{name}{schema}")
        assert str(defined) == str(written)


@COMPILED_ONLY
def test_operators_refuse_what_they_would_read_out_of_bounds():
    x = half(32, 64)
    with pytest.raises((RuntimeError, ValueError), match="no multiple"):
        torch.ops.nvit.compress_2to4([x[:31]], [], None, True)
    with pytest.raises((RuntimeError, ValueError), match="differ in shape"):
        torch.ops.nvit.compress_2to4([x], [torch.ones(32, 32, dtype=torch.bool)], None, True)
    with pytest.raises((RuntimeError, ValueError), match="differ in shape"):
        torch.ops.nvit.decompress_2to4([x], [torch.zeros(32, 4, dtype=torch.int16)], True)


def test_without_compiled_code_plain_torch_serves_and_says_so():
    script = """
        import sys, warnings
        sys.modules["nvit_kernels._C"] = None  # importing it fails, as where nothing was compiled
        import torch
        from nvit_kernels import sparse24
        from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as convert
        x = torch.randn(64, 128).half()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            packed = sparse24.compress_2to4(x)
            sparse24.compress_2to4(x)
        assert len(caught) == 1 and "runs in plain torch" in str(caught[0].message), caught
        values, meta = convert(torch.where(sparse24.unpack_bits(packed.bitmask), x, 0))
        assert torch.equal(packed.values, values) and torch.equal(packed.meta, meta)
        assert torch.equal(sparse24.decompress_2to4(packed.values, packed.meta), sparse24.mask_2to4(x) * x)
        torch.library.opcheck(torch.ops.nvit.compress_2to4.default, ([x], [], None, True))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
