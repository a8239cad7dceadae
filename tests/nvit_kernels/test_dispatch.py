"""One rule an op says whether its kernels run: the engine that asks and the op that runs get the same answer."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from nvit.layers import functional as engine
from nvit_kernels import Kept, functional, reference

CASES = {  # dtype, qk dim, v dim, batch: whether a GPU runs it fused
    "float32, 64": (torch.float32, 64, 64, 2, True),
    "float32, too wide": (torch.float32, 80, 80, 2, False),
    "float32, values too wide": (torch.float32, 64, 72, 2, False),
    "bfloat16, 256": (torch.bfloat16, 256, 256, 2, True),
    "bfloat16, too wide": (torch.bfloat16, 264, 256, 2, False),
    "no multiple of 8": (torch.float16, 36, 40, 2, False),
    "float64": (torch.float64, 64, 64, 2, False),
    "more samples than a grid": (torch.float16, 8, 8, 65536, False),
}


@pytest.fixture
def ran(monkeypatch):
    """Which of the two ways attention went, in order; neither computes anything."""
    calls = []

    def path(name):
        return lambda q, k, v, *_, **__: calls.append(name) or torch.empty_like(v)

    monkeypatch.setattr(functional, "fused_attention", path("kernel"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", path("sdpa"))
    return calls


@pytest.mark.parametrize("name", CASES)
def test_attention_goes_one_way_whoever_asks(name, ran):
    dtype, qk, v_dim, batch, fused = CASES[name]
    with FakeTensorMode():
        q, k = torch.empty(2, batch, 3, 5, qk, dtype=dtype, device="cuda")
        v = torch.empty(batch, 3, 5, v_dim, dtype=dtype, device="cuda")
        functional.attention(q, k, v, 0.1)
        engine._attend(q, k, v, 0.1, None, None, 0.0)
        assert functional.attention_takes(q, v_dim) is fused
    assert ran == ["kernel" if fused else "sdpa"] * 2


SIZED = {  # tokens, images, dtype: whether the kernel of short rows adds the mass
    "short rows": (197, 128, torch.bfloat16, True),
    "an odd few": (23, 128, torch.float16, True),
    "too many tokens": (209, 128, torch.bfloat16, False),
    "too few heads": (197, 2, torch.bfloat16, False),
    "float32": (197, 128, torch.float32, False),
}


@pytest.mark.parametrize("name", SIZED)
def test_sizes_of_merged_tokens_reach_the_kernel_of_short_rows(name, ran, monkeypatch):
    """From the engine and from the op itself; elsewhere, and beside a mask, torch's attention has them as a mask."""
    tokens, batch, dtype, short = SIZED[name]
    masses, masks, sdpa = [], [], F.scaled_dot_product_attention

    def kernel(q, k, v, scale, *scores):
        ran.append("short")
        masses.append(scores[-1])
        return torch.empty_like(v)

    monkeypatch.setattr(functional, "short_attention", kernel)
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **kw: masks.append(kw["attn_mask"]) or sdpa(*a, **kw)
    )
    with FakeTensorMode(), torch.no_grad():
        x, sizes = torch.empty(batch, tokens, 384, dtype=dtype, device="cuda"), torch.ones(batch, tokens, device="cuda")
        same, shape = (lambda x: x), dict(heads=2, qk_dim=64, v_dim=64, scale=0.1)
        engine.attention(x, [same], same, sizes=sizes, **shape)
        q = torch.empty(batch, 2, tokens, 64, dtype=dtype, device="cuda")
        functional.attention(q, q, q, 0.1, mass=sizes)
        assert ran == ["short" if short else "sdpa"] * 2
        assert all(mass.shape == sizes.shape and mass.dtype == torch.float32 for mass in masses)
        attn_mask = torch.empty(1, 1, tokens, tokens, dtype=dtype, device="cuda")
        engine.attention(x, [same], same, sizes=sizes, attn_mask=attn_mask, **shape)
        assert ran[2:] == ["sdpa"]
        with engine.kernels(False):
            engine.attention(x, [same], same, sizes=sizes, **shape)
        assert ran[3:] == ["sdpa"]
        assert masks[-1].shape == (batch, 1, 1, tokens) and masks[-1].stride(0) % 8 == 0


def test_under_autocast_the_dtype_that_counts_is_autocasts(ran):
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # the context manager turns itself off where there is no GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode():
            q = torch.empty(2, 3, 5, 80, device="cuda")
            assert functional.attention_takes(q, 80)
            functional.attention(q, q, q, 0.1)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
    assert ran == ["kernel"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_fallback_makes_no_matrix_of_tokens_by_tokens_and_is_right(dtype, monkeypatch):
    """Through torch's attention, over kept lists, with bias, mask and scores: what the definition says."""
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 3, 9, 8), torch.randn(4, 3, 9, 8), torch.randn(4, 3, 9, 16)
    bias, mask = torch.randn(3, 9, 9), torch.zeros(2, 9, 9).masked_fill(torch.rand(2, 9, 9) < 0.3, -100.0)
    kept = [Kept.from_mask(torch.arange(n) % 3 != 1) for n in (3, 8, 16)]
    calls, run = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **kw: calls.append(1) or run(*a, **kw))

    def step(call, to):
        leaves = [t.to(dtype).to(to).clone().requires_grad_() for t in (q, k, v, bias)]
        scores = [torch.zeros(shape, dtype=to if to == torch.float64 else torch.float32) for shape in
                  ((4, 3), (4, 8), (16,))]  # fmt: skip
        out = call(*leaves[:3], 0.3, *kept, *scores, bias=leaves[3], mask=mask.to(to))
        out.square().sum().backward()
        return [out.detach(), *(t.grad for t in leaves), *scores]

    ours, exact = step(functional.attention, dtype), step(reference.attention, torch.float64)
    assert len(calls) == 1, "the definition's product ran"
    for a, b in zip(ours, exact, strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
        assert (a.double() - b).norm() <= tolerance * b.norm()
