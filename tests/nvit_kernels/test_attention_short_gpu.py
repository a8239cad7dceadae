"""Attention over short rows on a GPU: bf16 and float16 against float64, the same bits twice, captured in a graph."""

import pytest
import torch

from nvit.layers import functional as engine
from nvit_kernels import functional, reference
from nvit_kernels.ops.attention.short import attention_short, attention_short_packed, takes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("nan_filled_memory"),
]
SCALE = 0.2


def operands(batch, heads, tokens, qk, v, dtype):
    """q, k, v, ∂o, laid out token by token as projections make them."""
    return [torch.randn(batch, tokens, heads, dim, device="cuda").to(dtype).transpose(1, 2) for dim in (qk, qk, v, v)]


def mass_of_counts(batch, tokens):
    """Logs of how many tokens each stands for."""
    return torch.randint(1, 21, (batch, tokens), device="cuda").float().log()


def everything(call, q, k, v, do, mass=None):
    """Output, gradients and scores per sample."""
    leaves, kind = [t.detach().requires_grad_() for t in (q, k, v)], torch.promote_types(q.dtype, torch.float32)
    scores = [torch.zeros(len(q), units, device="cuda", dtype=kind) for units in (q.shape[1], q.shape[3], v.shape[3])]
    out = call(*leaves, SCALE, head_scores=scores[0], qk_scores=scores[1], v_scores=scores[2], mass=mass)
    return [out.detach(), *torch.autograd.grad(out, leaves, do), *scores]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "qk", "v"),
    [(1, 8, 24), (16, 64, 64), (49, 32, 32), (50, 40, 56), (65, 48, 48), (128, 64, 64), (160, 64, 32), (197, 64, 64),
     (197, 24, 56), (208, 8, 8)],
)  # fmt: skip
def test_as_accurate_as_eager_and_the_same_bits_twice(tokens, qk, v, dtype):
    check(operands(3, 2, tokens, qk, v, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 16, 23, 33, 49, 65, 77, 101, 129, 131, 161, 173, 185, 197, 208])
@pytest.mark.parametrize(("qk", "v"), [(64, 64), (24, 56), (32, 32)])
def test_keys_with_a_mass(qk, v, tokens, dtype):
    check(operands(3, 2, tokens, qk, v, dtype), mass_of_counts(3, tokens))


def check(given, mass=None):
    """Outputs, gradients and scores against float64, with what eager is wrong by in the same dtype."""
    dtype = given[0].dtype
    if not takes(given[0], given[2].shape[-1]):
        pytest.skip("not offered on this device")
    calls = attention_short, attention_short, reference.attention
    ours, again, eager = (everything(call, *given, mass) for call in calls)
    exact = everything(reference.attention, *(t.double() for t in given), mass)
    for mine, twice, other, right in zip(ours, again, eager, exact, strict=True):
        assert torch.equal(mine, twice)
        error, allowed = ((t.double() - right).abs().max() for t in (mine, other))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * max(1.0, right.abs().max().item())


@pytest.mark.parametrize("with_mass", [False, True])
def test_a_captured_step_gives_the_eager_steps_bits(with_mass):
    *tensors, do = operands(2, 3, 197, 32, 32, torch.bfloat16)
    packed = torch.stack([t.transpose(1, 2) for t in tensors], 2).requires_grad_()
    mass = mass_of_counts(2, 197) if with_mass else None

    def step():
        return torch.autograd.grad(attention_short_packed(packed, SCALE, mass=mass), packed, do)[0]

    expected, stream = step(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert torch.equal(found, expected)
    if with_mass:  # the graph reads whatever sizes are there
        mass.copy_(mass_of_counts(2, 197))
        graph.replay()
        assert torch.equal(found, step()) and not torch.equal(found, expected)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [23, 101, 185, 197])
def test_a_models_attention_of_merged_tokens_is_the_same_with_and_without_kernels(
    tokens, dtype, gradients, monkeypatch
):
    """Through the engine, whose rule takes the kernel here; sizes of real counts, from a packed projection."""
    taken, short = [], functional.short_attention
    monkeypatch.setattr(functional, "short_attention", lambda *a: taken.append(a[-1]) or short(*a))
    heads, dim, batch = 4, 64, 64
    x = torch.randn(batch, tokens, 3 * heads * dim, device="cuda")
    sizes = torch.randint(1, 21, (batch, tokens), device="cuda").float()
    same, widths = (lambda x: x), dict(heads=heads, qk_dim=dim, v_dim=dim, scale=SCALE, sizes=sizes)
    do = torch.randn(batch, tokens, heads * dim, device="cuda")

    def step(kind, on=True):
        leaf = x.to(dtype).to(kind).requires_grad_(gradients)
        with engine.kernels(on), torch.set_grad_enabled(gradients):
            out = engine.attention(leaf, [same], same, **widths)
        return [out.detach(), *(torch.autograd.grad(out, leaf, do.to(dtype).to(kind)) if gradients else ())]

    ours = step(dtype)
    assert len(taken) == 1 and taken[0].shape == (batch, tokens)
    plain, exact = step(dtype, on=False), step(torch.float64, on=False)
    assert len(taken) == 1
    for mine, other, right in zip(ours, plain, exact, strict=True):
        error, allowed = ((t.double() - right).abs().max() for t in (mine, other))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * max(1.0, right.abs().max().item())
