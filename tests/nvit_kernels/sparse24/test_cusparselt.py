"""cuSPARSELt's buffer: our layout where it is proven on the device, torch's compressor everywhere else."""

import pytest
import torch

from nvit_kernels import sparse24
from nvit_kernels.sparse24 import cusparselt


@pytest.fixture
def library(monkeypatch):
    """Stands in for cuSPARSELt: compresses into a layout of the test's choosing and counts its calls."""

    def install(layout):
        def compress(pruned):
            calls.append(tuple(pruned.shape))
            if not sparse24.fits_2to4(pruned.shape, pruned.dtype):
                return pruned.new_zeros(pruned.numel() * 9 // 16)
            packed = sparse24.compress_2to4(pruned)
            meta = cusparselt.LAYOUTS[layout](packed.meta) if layout else packed.meta.flatten().flip(0)
            return torch.cat((packed.values.flatten().view(torch.uint8), meta.flatten().view(torch.uint8))).view(
                pruned.dtype
            )

        calls = []
        monkeypatch.setattr(torch, "_cslt_compress", compress)
        cusparselt.verified_layout.cache_clear()
        return calls

    yield install
    cusparselt.verified_layout.cache_clear()


def matrix(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


@pytest.mark.parametrize("layout", list(cusparselt.LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_a_proven_layout_is_ours_to_write(library, layout, dtype):
    calls = library(layout)
    x = (matrix(64, 256) * 30).to(dtype)
    reference = torch._cslt_compress(torch.where(sparse24.mask_2to4(x), x, torch.zeros((), dtype=dtype)))
    ours = cusparselt.compress_cusparselt(x)
    assert torch.equal(ours.view(torch.uint8), reference.view(torch.uint8))
    assert ours.numel() * 16 == x.numel() * (10 if dtype == torch.int8 else 9)
    proved = len(calls)
    cusparselt.compress_cusparselt(x + 1)
    assert len(calls) == proved, "proven once, not again"


def test_an_unknown_layout_is_left_to_torch(library):
    calls = library(None)
    x = matrix(64, 256)
    mask = sparse24.mask_2to4(x)
    ours = cusparselt.compress_cusparselt(x)
    assert cusparselt.verified_layout(x.device, x.dtype) is None
    assert calls[-1] == (64, 256)
    assert torch.equal(ours, torch._cslt_compress(torch.where(mask, x, 0)))


def test_shapes_only_cusparselt_takes_go_to_torch(library):
    calls = library("as CUTLASS")
    ours = cusparselt.compress_cusparselt(matrix(48, 496))
    assert calls == [(48, 496)] and ours.numel() == 48 * 496 * 9 // 16


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (
            lambda: cusparselt.compress_cusparselt(matrix(40, 64)),
            r"shape \(40, 64\), expected \(M, K\) in multiples of 16",
        ),
        (lambda: cusparselt.compress_cusparselt(matrix(64, 64).float()), "expected float16, bfloat16 or int8"),
        (lambda: cusparselt.compress_cusparselt(matrix(48, 48)), "torch cannot compress on cpu"),
    ],
)
def test_refused_in_one_line(attempt, words):
    with pytest.raises(ValueError, match=words) as caught:
        attempt()
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_product_on_a_gpu(dtype):
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).to(dtype).cuda()
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    buffer = cusparselt.compress_cusparselt(weight)
    dense = torch.where(sparse24.mask_2to4(weight), weight, torch.zeros((), dtype=dtype, device="cuda"))
    expected = dense.double() @ x.double()
    ours = torch._cslt_sparse_mm(buffer, x)
    error, allowed = ((y.double() - expected).abs().max() for y in (ours, dense @ x))
    assert error <= 2 * allowed + 1e-6  # no worse than twice the dense product's own rounding
