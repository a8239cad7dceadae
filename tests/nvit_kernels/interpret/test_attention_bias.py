"""Attention with a bias of heads and a mask of windows, against float64."""

import pytest
import torch

from nvit_kernels import functional, reference
from nvit_kernels.ops.attention import op

DTYPES = [torch.float32, torch.float16]


def tensors(batch, heads, tokens, dtype, bias=torch.float32, qk=24, v=56):
    q, k = torch.randn(2, batch, heads, tokens, qk).to(dtype)
    return dict(q=q, k=k, v=torch.randn(batch, heads, tokens, v).to(dtype),
                bias=torch.randn(heads, tokens, tokens).to(bias))  # fmt: skip


def shifted(windows, tokens):
    """Masks as of shifted windows: each window is cut in two sides that don't see each other, at another place."""
    side = torch.arange(tokens) >= torch.arange(windows).unsqueeze(1) * tokens // windows
    return torch.zeros(windows, tokens, tokens).masked_fill(side.unsqueeze(1) != side.unsqueeze(2), -100.0)


def check(compare, data, mask=None, scores=None, **kept):
    def call(function):
        return lambda **arguments: function(scale=24**-0.5, mask=mask, **kept, **arguments)

    return compare(call(functional.attention), call(reference.attention), data, scores)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "windows", "heads", "tokens"), [(4, 2, 2, 49), (2, 2, 3, 50), (3, 1, 1, 17), (1, 1, 1, 197)]
)
def test_bias_and_mask(compare, batch, windows, heads, tokens, dtype):
    check(compare, tensors(batch, heads, tokens, dtype), shifted(windows, tokens))


@pytest.mark.parametrize("dtype", DTYPES)
def test_over_kept_units_with_scores(compare, keeping, dtype):
    heads, qk, v_dim = (keeping(n, "two thirds") for n in (3, 24, 56))
    scores = dict(head_scores=(2, 3), qk_scores=(2, 24), v_scores=(56,))
    mask = shifted(2, 49).to(dtype)
    got = check(compare, tensors(2, 3, 49, dtype, bias=dtype), mask, scores, heads=heads, qk=qk, v_dim=v_dim)
    assert (got["gradient of bias"][~heads.mask] == 0).all() and got["gradient of bias"][heads.mask].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_that_cut_rows_and_shut_keys(compare, monkeypatch, dtype):
    """Several tiles each way and several parts of the sum; a mask of -inf shuts whole tiles, the first among them."""
    for kernel in (op.forward_tuned, op.dkv_tuned, op.dq_tuned, op.dbias_tuned):
        (config,) = kernel.configs
        for size in config.kwargs:
            monkeypatch.setitem(config.kwargs, size, 32)
    monkeypatch.setattr(op, "BIAS_PROGRAMS", 2)
    mask = torch.zeros(1, 75, 75)
    mask[0, 40:, :40] = -torch.inf
    assert op.bias_splits(3, 1, 75) == 1 and op.bias_splits(3, 1, 64) == 2
    monkeypatch.setattr(op, "BIAS_PROGRAMS", 8)
    assert op.bias_splits(3, 1, 75) == 2
    check(compare, tensors(3, 1, 75, dtype), mask)


def test_either_alone(compare):
    data = tensors(2, 2, 17, torch.float32)
    check(compare, data)
    del data["bias"]
    check(compare, data, shifted(2, 17))


def test_a_bias_beyond_the_range_of_exp():
    """Keys past the last are shut even where every logit of a row lies so low that its exponential is zero."""
    data = tensors(1, 1, 9, torch.float32)
    low = {**data, "bias": data["bias"] - 1000.0}
    got, expected = ([t.requires_grad_() for t in each.values()] for each in (low, data))
    for leaves in (got, expected):
        functional.attention(*leaves[:3], 0.2, bias=leaves[3]).sum().backward()
    for ours, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=0, atol=2e-4)  # a thousand rounds to 6e-5


def test_the_gradient_of_the_bias_has_its_dtype_and_is_made_on_demand(monkeypatch):
    launched = []
    run = op.dbias_kernel.run
    monkeypatch.setattr(op.dbias_kernel, "run", lambda *a, **k: launched.append(1) or run(*a, **k))
    for bias, wanted in ((torch.float16, True), (torch.float32, True), (torch.float32, False)):
        launched.clear()
        *qkv, b = (t.requires_grad_() for t in tensors(1, 1, 9, torch.float16, bias).values())
        b.requires_grad_(wanted)
        functional.attention(*qkv, 0.2, bias=b).sum().backward()
        assert bool(launched) is wanted and (b.grad.dtype == bias if wanted else b.grad is None)


def test_parts_of_the_sum_fill_a_gpu_and_never_exceed_the_batch():
    for batch, heads, tokens in ((4096, 3, 49), (64, 12, 197), (1, 1, 1), (64, 24, 1025)):
        parts, tiles = op.bias_splits(batch, heads, tokens), heads * (-(-tokens // 64)) ** 2
        assert 1 <= parts <= batch and (parts == batch or parts * tiles >= op.BIAS_PROGRAMS)
        assert parts * heads * tokens**2 * 4 <= max(32 << 20, heads * tokens**2 * 4)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (dict(bias=torch.zeros(2, 9, 9)), "expected .heads, tokens, tokens., .3, 9, 9."),
        (dict(bias=torch.zeros(3, 9, 9, dtype=torch.float64)), "bias is torch.float64"),
        (dict(mask=torch.zeros(3, 9, 9)), "divides the batch of 4"),
        (dict(mask=torch.zeros(2, 9, 8)), "expected .windows, 9, 9."),
        (dict(mask=torch.zeros(2, 9, 9, dtype=torch.bool)), "mask is torch.bool"),
    ],
)
def test_what_a_caller_gets_wrong_is_named(wrong, match):
    q, k, v, _ = tensors(4, 3, 9, torch.float32).values()
    with pytest.raises(ValueError, match=match):
        op.attention(q, k, v, 0.2, **wrong)


def test_opcheck():
    q, k, v, bias = (t.requires_grad_() for t in tensors(2, 2, 9, torch.float32, qk=8, v=16).values())
    arguments = (q, k, v, 0.2, *[None] * 7, bias, shifted(2, 9))
    torch.library.opcheck(op.operator, arguments)
    with torch.no_grad():
        o, stats = op.operator(*arguments)
    saved = (torch.randn_like(o), *(t.detach() for t in (q, k, v)), o, stats, 0.2, *[None] * 7, bias.detach(),
             shifted(2, 9))  # fmt: skip
    torch.library.opcheck(op.operator_backward, (*saved, True))
