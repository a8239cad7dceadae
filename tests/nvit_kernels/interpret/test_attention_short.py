"""Attention over short rows against the reference, under the interpreter: every piece count, width and layout."""

from functools import partial

import pytest
import torch

from nvit_kernels import reference
from nvit_kernels.ops.attention import short as op
from nvit_kernels.ops.attention.short import attention_short, attention_short_packed, takes
from nvit_kernels.ops.attention.short_layouts import LARGEST_TOKENS, Config, key_pieces

pytestmark = pytest.mark.usefixtures("quick_interpreter")

TOKENS = [1, 16, 49, 50, 64, 65, 128, 129, 196, 197, 198, 208]
WIDTHS = [(64, 64), (24, 56), (32, 32), (8, 8), (40, 56), (48, 48)]


def tensors(batch, heads, tokens, qk, v, dtype):
    q, k = torch.randn(2, batch, heads, tokens, qk).to(dtype)
    return dict(q=q, k=k, v=torch.randn(batch, heads, tokens, v).to(dtype))


def mass_of_counts(batch, tokens):
    """Logs of how many tokens each stands for."""
    return torch.randint(1, 21, (batch, tokens)).float().log()


def check(compare, data, per_sample=True, mass=None):
    (b, h, _, d), e = data["q"].shape, data["v"].shape[-1]
    units = dict(head_scores=h, qk_scores=d, v_scores=e)
    scores = {name: (b, n) if per_sample else (n,) for name, n in units.items()}

    def call(function):
        return lambda **arguments: function(scale=d**-0.5, mass=mass, **arguments)

    return compare(call(attention_short), call(reference.attention), data, scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens(compare, tokens, dtype):
    check(compare, tensors(2, 2, tokens, 24, 56, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("qk", "v"), WIDTHS)
def test_widths(compare, qk, v, dtype):
    check(compare, tensors(2, 3, 50, qk, v, dtype), per_sample=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [23, 33, 64, 131, 197, 208])
def test_keys_with_a_mass(compare, tokens, dtype):
    check(compare, tensors(2, 2, tokens, 24, 56, dtype), mass=mass_of_counts(2, tokens))


def test_a_mass_of_any_layout_counts_its_tokens_as_if_they_were_there():
    """Every third token is there twice, which is what a key of mass log 2 stands for."""
    q, k, v = tensors(2, 2, 9, 24, 56, torch.float32).values()
    twice = torch.tensor([0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8])
    mass = torch.tensor([1.0, 2, 1] * 3).log()[:, None].expand(9, 2).mT
    assert not mass.is_contiguous()
    exact = reference.attention(*(t.double() for t in (q[:, :, twice], k[:, :, twice], v[:, :, twice])), 0.2)
    first = [int((twice == i).nonzero()[0]) for i in range(9)]
    found = attention_short(q, k, v, 0.2, mass=mass)
    torch.testing.assert_close(found.double(), exact[:, :, first], rtol=0, atol=1e-5)


def test_a_large_mass_leaves_no_gradient_infinite():
    """Of queries past the last, a weight is exp of the mass alone: in float16 infinite, times a gradient of zero."""
    data, do = tensors(1, 1, 50, 32, 32, torch.float16).values(), torch.randn(1, 1, 50, 32).half()
    mass = torch.full((1, 50), 20.0)
    found = gradients(partial(attention_short, mass=mass), data, do, ())
    expected = gradients(attention_short, data, do, ())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=float(4e-3 * theirs.abs().max()))


@pytest.mark.parametrize("with_mass", [False, True])
@pytest.mark.parametrize("rows", [32, 64])
@pytest.mark.parametrize("delta_first", [False, True])
def test_every_layout_of_the_kernels_computes_the_same(rows, delta_first, with_mass):
    q, k, v = tensors(1, 2, 131, 24, 56, torch.float32).values()
    mass = mass_of_counts(1, 131) if with_mass else None
    plan, *_ = op.read(q, k, v)
    o, lse = op.launch(plan, q, k, v, 0.2, mass=mass)
    do, expected, found = torch.randn_like(o), op.separate_gradients(q, v), op.separate_gradients(q, v)
    scores, scores_ = [(torch.zeros(1, 2), torch.zeros(1, 24), torch.zeros(56)) for _ in range(2)]
    op.launch_backward(plan, do, q, k, v, o, lse, 0.2, expected, scores, mass=mass)
    config = Config(rows=rows, warps=4, stages=1, delta_first=delta_first)
    o_, lse_ = op.launch(plan, q, k, v, 0.2, config, mass)
    op.launch_backward(plan, do, q, k, v, o, lse, 0.2, found, scores_, config, mass)
    for ours, theirs in zip((o_, lse_, *found, *scores_), (o, lse, *expected, *scores), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max())


def test_scores_are_added_to_buffers_of_any_kind_and_layout():
    """Per sample or summed, some not asked for, and one whose units lie apart."""
    data, do = tensors(3, 2, 9, 24, 56, torch.float32).values(), torch.randn(3, 2, 9, 56)
    every = (torch.zeros(3, 2), torch.zeros(3, 24), torch.zeros(3, 56))
    gradients(attention_short, data, do, every)
    apart = torch.ones(24, 3).T
    gradients(attention_short, data, do, (torch.ones(2), apart, None))
    gradients(attention_short, data, do, (None, None, total := torch.ones(56)))
    torch.testing.assert_close(apart, 1 + every[1])
    torch.testing.assert_close(total, 1 + every[2].sum(0))
    head = torch.ones(2)
    gradients(attention_short, data, do, (head, None, None))
    torch.testing.assert_close(head, 1 + every[0].sum(0))


def test_keys_past_the_last_weigh_nothing_however_negative_the_logits():
    """Their k is zero, so their logit 0 is the largest of the row: in float16 its weight would be infinite."""
    q = torch.rand(1, 1, 50, 32).half() + 1
    data = dict(q=q, k=-4 * q.flip(2), v=torch.randn(1, 1, 50, 32).half())
    assert (data["q"].float() @ data["k"].float().mT * 32**-0.5).max() < -30
    leaves = [t.requires_grad_() for t in data.values()]
    grads = torch.autograd.grad(attention_short(*leaves, 32**-0.5).sum(), leaves)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(reference.attention(*exact_leaves, 32**-0.5).sum(), exact_leaves)
    for ours, theirs in zip(grads, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=4e-3 * theirs.abs().max().clamp_min(1))


def gradients(call, inputs, do, scores):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = call(*leaves, 0.2, *scores)
    return out.detach(), *torch.autograd.grad(out, leaves, do)


def buffers(batch, heads, dim):
    return torch.zeros(batch, heads), torch.zeros(dim), torch.zeros(batch, dim)


@pytest.mark.parametrize("with_mass", [False, True])
def test_a_packed_projection_is_read_in_place_and_its_gradient_is_packed(with_mass):
    packed, do = torch.randn(2, 50, 3, 4, 24), torch.randn(2, 4, 50, 24)
    q, k, v = op.unpack(packed)
    assert all(a is b for a, b in zip(op.read(q, k, v)[1:], (q, k, v), strict=True))
    apart, together = buffers(2, 4, 24), buffers(2, 4, 24)
    mass = mass_of_counts(2, 50) if with_mass else None
    out, *expected = gradients(partial(attention_short, mass=mass), (q, k, v), do, apart)
    out_, gradient = gradients(partial(attention_short_packed, mass=mass), (packed,), do, together)
    assert torch.equal(out, out_)
    assert torch.equal(torch.stack([g.transpose(1, 2) for g in expected], 2), gradient)
    assert all(torch.equal(*pair) for pair in zip(apart, together, strict=True))


def strided(t):
    """The same values where a row is not contiguous, starts unaligned, or no stride is a multiple of 8."""
    spread = torch.stack([t, t], -1)[..., 1]
    shifted = torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    odd = torch.cat([t, t[..., :1]], -1)[..., :-1]
    return {
        "spread": spread,
        "shifted": shifted,
        "odd": odd,
        "by token": t.transpose(1, 2).contiguous().transpose(1, 2),
    }


@pytest.mark.parametrize("layout", ["spread", "shifted", "odd", "by token"])
def test_other_layouts_give_the_same_bits(layout):
    data, do = tensors(1, 2, 9, 24, 56, torch.float32), torch.randn(1, 2, 9, 56)
    expected = gradients(attention_short, data.values(), do, ())
    moved = [strided(t)[layout] for t in data.values()]
    found = gradients(attention_short, moved, strided(do)[layout], ())
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_q_and_k_laid_out_differently_are_read_right():
    q, k, v = tensors(1, 2, 9, 24, 56, torch.float32).values()
    mixed = attention_short(q, strided(k)["by token"], v, 0.2)
    assert torch.equal(mixed, attention_short(q, k, v, 0.2))


def test_pieces_hold_the_keys_and_waste_less_than_sixteen():
    for tokens in range(1, LARGEST_TOKENS + 1):
        pieces = key_pieces(tokens)
        assert 0 <= sum(pieces) - tokens < 16 and pieces[0] >= pieces[1] >= pieces[2]
    assert key_pieces(197) == (128, 64, 16) and key_pieces(50) == (64, 0, 0)


@pytest.mark.parametrize(
    ("shape", "v", "dtype"),
    [((1, 2, 209, 64), 64, torch.float16), ((1, 2, 50, 72), 64, torch.float16), ((1, 2, 50, 64), 72, torch.float16),
     ((1, 2, 50, 20), 64, torch.float16), ((1, 2, 50, 64), 64, torch.float64), ((0, 2, 50, 64), 64, torch.float16)],
)  # fmt: skip
def test_what_is_not_offered_is_said_so(shape, v, dtype):
    q, value = torch.zeros(shape, dtype=dtype), torch.zeros(*shape[:3], v, dtype=dtype)
    assert not takes(q, v)
    with pytest.raises(ValueError, match=r"not offered|multiples of 8"):
        attention_short(q, q, value, 0.2)


def test_what_a_caller_gets_wrong_is_named():
    q, k, v = tensors(1, 2, 8, 24, 56, torch.float32).values()
    with pytest.raises(ValueError, match="expected"):
        attention_short(q, k[:, :, :4], v, 0.2)
    with pytest.raises(ValueError, match="one dtype"):
        attention_short(q, k, v.half(), 0.2)
    for mass in (torch.zeros(1, 7), torch.zeros(1, 8).half()):
        with pytest.raises(ValueError, match=r"mass is .*, expected torch.float32"):
            attention_short(q, k, v, 0.2, mass=mass)


@pytest.mark.parametrize("more", [(), (torch.tensor([[1.0, 2, 3, 1, 7, 1, 1, 2]]).log(),)])
def test_opcheck(more):
    q, k, v = (t.requires_grad_() for t in tensors(1, 2, 8, 8, 16, torch.float32).values())
    torch.library.opcheck(op.operator, (q, k, v, 0.2, None, None, None, *more))
    with torch.no_grad():
        o, lse = op.operator(q, k, v, 0.2, None, None, None, *more)
    saved = (torch.randn_like(o), *(t.detach() for t in (q, k, v)), o, lse, 0.2)
    torch.library.opcheck(op.operator_backward, (*saved, *buffers(1, 2, 8)[:2], torch.zeros(1, 16), *more))


@pytest.mark.parametrize("with_mass", [False, True])
def test_the_custom_op_gives_the_hot_paths_bits(with_mass):
    ours = partial(attention_short, mass=mass_of_counts(2, 17) if with_mass else None)
    data, do = tensors(2, 2, 17, 8, 8, torch.float32).values(), torch.randn(2, 2, 17, 8)
    hot, compiled = buffers(2, 2, 8), buffers(2, 2, 8)
    expected = gradients(ours, data, do, hot)
    found = gradients(lambda *a: op.operator(*a, **ours.keywords)[0], data, do, compiled)
    assert all(torch.equal(*pair) for pair in zip((*found, *compiled), (*expected, *hot), strict=True))
    whole = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(*pair) for pair in zip(gradients(whole, data, do, buffers(2, 2, 8)), expected, strict=True))
