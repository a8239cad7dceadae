"""Attention over short rows on a GPU: bf16 and float16 against float64, the same bits twice, captured in a graph."""

import pytest
import torch

from nvit_kernels import reference
from nvit_kernels.ops.attention.short import attention_short, attention_short_packed, takes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SCALE = 0.2


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """Every uninitialised float is NaN, so an element that no kernel wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(batch, heads, tokens, qk, v, dtype):
    """q, k, v, ∂o, laid out token by token as projections make them."""
    return [torch.randn(batch, tokens, heads, dim, device="cuda").to(dtype).transpose(1, 2) for dim in (qk, qk, v, v)]


def everything(call, q, k, v, do):
    """Output, gradients and scores per sample."""
    leaves, kind = [t.detach().requires_grad_() for t in (q, k, v)], torch.promote_types(q.dtype, torch.float32)
    scores = [torch.zeros(len(q), units, device="cuda", dtype=kind) for units in (q.shape[1], q.shape[3], v.shape[3])]
    out = call(*leaves, SCALE, head_scores=scores[0], qk_scores=scores[1], v_scores=scores[2])
    return [out.detach(), *torch.autograd.grad(out, leaves, do), *scores]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "qk", "v"),
    [(1, 8, 24), (16, 64, 64), (49, 32, 32), (50, 40, 56), (65, 48, 48), (128, 64, 64), (160, 64, 32), (197, 64, 64),
     (197, 24, 56), (208, 8, 8)],
)  # fmt: skip
def test_as_accurate_as_eager_and_the_same_bits_twice(tokens, qk, v, dtype):
    given = operands(3, 2, tokens, qk, v, dtype)
    if not takes(given[0], v):
        pytest.skip("not offered on this device")
    ours, again, eager = (everything(call, *given) for call in (attention_short, attention_short, reference.attention))
    exact = everything(reference.attention, *(t.double() for t in given))
    for mine, twice, other, right in zip(ours, again, eager, exact, strict=True):
        assert torch.equal(mine, twice)
        error, allowed = ((t.double() - right).abs().max() for t in (mine, other))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * max(1.0, right.abs().max().item())


def test_a_captured_step_gives_the_eager_steps_bits():
    *tensors, do = operands(2, 3, 197, 32, 32, torch.bfloat16)
    packed = torch.stack([t.transpose(1, 2) for t in tensors], 2).requires_grad_()

    def step():
        return torch.autograd.grad(attention_short_packed(packed, SCALE), packed, do)[0]

    expected, stream = step(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert torch.equal(found, expected)
