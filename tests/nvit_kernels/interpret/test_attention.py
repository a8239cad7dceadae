import pytest
import torch

from nvit_kernels import functional, reference
from nvit_kernels.kept import Kept
from nvit_kernels.ops.attention import op, operands

WIDTHS = [(8, 8), (24, 56), (40, 104), (56, 24), (104, 200), (64, 64)]
DTYPES = [torch.float32, torch.float16]


def tensors(batch, heads, tokens, qk, v, dtype):
    q, k = torch.randn(2, batch, heads, tokens, qk).to(dtype)
    return dict(q=q, k=k, v=torch.randn(batch, heads, tokens, v).to(dtype))


def check(compare, data, heads, qk, v_dim):
    kept = dict(heads=heads, qk=qk, v_dim=v_dim)
    (b, h, _, d), e = data["q"].shape, data["v"].shape[-1]
    scores = dict(head_scores=(b, h), qk_scores=(b, d), v_scores=(e,))

    def call(function):
        return lambda **arguments: function(scale=d**-0.5, **kept, **arguments)

    return compare(call(functional.attention), call(reference.attention), data, scores)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("qk", "v"), WIDTHS)
@pytest.mark.parametrize("which", ["dense", "two thirds", "one unit"])
def test_widths(compare, keeping, qk, v, which, dtype):
    check(compare, tensors(2, 3, 50, qk, v, dtype), keeping(3, which), keeping(qk, which), keeping(v, which))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 50, 197, 198, 257])
def test_tokens(compare, keeping, tokens, dtype):
    check(compare, tensors(1, 2, tokens, 24, 56, dtype), None, keeping(24, "two thirds"), None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pruned_positions_are_exactly_zero(compare, keeping, dtype):
    data = tensors(2, 3, 50, 24, 56, dtype)
    heads, qk, v_dim = (keeping(n, "two thirds") for n in (3, 24, 56))
    got = check(compare, data, heads, qk, v_dim)
    assert (got["output 0"][:, ~heads.mask] == 0).all() and (got["output 0"][..., ~v_dim.mask] == 0).all()
    for name, dims in (("q", qk), ("k", qk), ("v", v_dim)):
        grad = got[f"gradient of {name}"]
        assert (grad[:, ~heads.mask] == 0).all() and (grad[..., ~dims.mask] == 0).all(), name
    assert (got["head_scores"][:, ~heads.mask] == 0).all() and (got["qk_scores"][:, ~qk.mask] == 0).all()


def test_what_is_pruned_is_never_used():
    data = tensors(1, 3, 50, 24, 56, torch.float32)
    heads = Kept.from_mask(torch.tensor([True, False, True]))
    expected = functional.attention(**data, scale=0.2, heads=heads)
    for t in data.values():
        t[:, 1] = float("nan")
    assert torch.equal(functional.attention(**data, scale=0.2, heads=heads), expected)


def test_views_of_a_packed_projection_need_no_copy():
    packed = torch.randn(2, 50, 3, 4, 24)
    q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
    assert operands.readable(q) is q and operands.readable(v) is v
    torch.testing.assert_close(functional.attention(q, k, v, 0.2), reference.attention(q, k, v, 0.2))


def test_strided_inputs_are_read_right():
    data = tensors(1, 2, 9, 24, 56, torch.float32)
    strided = {k: torch.stack([t, t], -1)[..., 1] for k, t in data.items()}
    results = (functional.attention(**each, scale=0.2) for each in (strided, data))
    assert torch.equal(*results)


LAYOUTS = {  # a tensor laid out in another order, which a stride of samples is derived from
    "by head": lambda t: t,
    "by token": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": lambda t: torch.stack([t.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2),
    "heads outermost": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "tokens outermost": lambda t: t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "every second sample": lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2],
    "one sample for all": lambda t: t[:1].expand_as(t),
    "part of a wider head": lambda t: torch.cat([t[..., :8], t], -1)[..., 8:],
    "a shifted start": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


def outcome(q, k, v, do):
    """The output, and gradients of q, k and v."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = functional.attention(*leaves, 0.2)
    return out.detach(), *torch.autograd.grad(out, leaves, do)


@pytest.mark.parametrize(("batch", "heads", "tokens"), [(2, 3, 5), (2, 1, 5), (2, 3, 1), (2, 1, 1), (1, 3, 5)])
@pytest.mark.parametrize("repeated", [False, True])
def test_any_layout_is_read_right(repeated, batch, heads, tokens):
    """All alike, and k laid out by token beside them: the bits of contiguous copies."""
    plain = [*tensors(batch, heads, tokens, 8, 16, torch.float32).values(), torch.randn(batch, heads, tokens, 16)]
    if repeated:
        plain = [t[:1].expand_as(t).contiguous() for t in plain]
    expected = outcome(*plain)
    for name, lay in LAYOUTS.items():
        if (name == "one sample for all") is repeated:
            laid = [lay(t) for t in plain]
            assert all(torch.equal(*pair) for pair in zip(laid, plain, strict=True)), f"{name} has other values"
            q, k, v, do = laid
            for each in ((q, k, v), (q, LAYOUTS["by token"](plain[1]), v)):
                assert all(torch.equal(*pair) for pair in zip(outcome(*each, do), expected, strict=True)), name


def test_keys_past_the_last_weigh_nothing_however_negative_the_logits():
    """Their k is zero, so their logit 0 is the largest of the row: its weight would be infinite in float16."""
    q = torch.rand(1, 1, 50, 32).half() + 1
    data = (q, -4 * q.flip(2), torch.randn(1, 1, 50, 32).half())
    leaves = [t.detach().clone().requires_grad_() for t in data]
    grads = torch.autograd.grad(functional.attention(*leaves, 32**-0.5).sum(), leaves)
    exact = [t.detach().double().requires_grad_() for t in data]
    expected = torch.autograd.grad(reference.attention(*exact, 32**-0.5).sum(), exact)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=4e-3 * float(theirs.abs().max().clamp_min(1)))


@pytest.mark.parametrize("wrong", ["shape", "width", "dtype", "list"])
def test_what_a_caller_gets_wrong_is_named(wrong):
    q, k, v = tensors(1, 2, 8, 24, 56, torch.float32).values()
    heads = None
    if wrong == "shape":
        k, match = k[:, :, :4], "expected"
    elif wrong == "width":
        q, k, match = torch.randn(1, 2, 8, 496), torch.randn(1, 2, 8, 496), "exceed 256"
    elif wrong == "dtype":
        v, match = v.half(), "one dtype"
    else:
        heads, match = Kept.all(3), "width of 3"
    with pytest.raises(ValueError, match=match):
        op.attention(q, k, v, 0.2, heads=heads)


def test_opcheck():
    q, k, v = (t.requires_grad_() for t in tensors(1, 2, 8, 8, 16, torch.float32).values())
    heads, qk = Kept.from_mask(torch.tensor([True, False])), Kept.all(8)
    arguments = (q, k, v, 0.2, heads.index, heads.count, qk.mask, *[None] * 6)
    torch.library.opcheck(op.operator, arguments)
    with torch.no_grad():
        o, stats = op.operator(*arguments)
    scores = (torch.zeros(1, 2), torch.zeros(8), torch.zeros(1, 16))
    saved = (
        torch.randn_like(o),
        *(t.detach() for t in (q, k, v)),
        o,
        stats,
        0.2,
        *arguments[4:8],
        *scores,
        None,
        None,
        False,
    )
    torch.library.opcheck(op.operator_backward, saved)
