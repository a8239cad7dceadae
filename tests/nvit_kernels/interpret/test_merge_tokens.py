"""Merged tokens: which, where to, their means and sizes, and the gradients of both."""

import pytest
import torch

from nvit_kernels import functional, reference
from nvit_kernels.ops.merge_tokens import op

DTYPES = [torch.float32, torch.float16]


def keys_of(batch, tokens, heads=2, dim=24):
    """Strided, as a fused projection gives them."""
    return torch.randn(batch, tokens, 3, heads, dim)[:, :, 1].transpose(1, 2)


def check(compare, tokens, r, prefix, dtype, sizes=True, width=24):
    keys = keys_of(2, tokens).to(dtype)
    data = {"x": torch.randn(2, tokens, width).to(dtype)}
    if sizes:
        data["sizes"] = torch.randint(1, 5, (2, tokens)).float()

    def call(function):
        return lambda x, sizes=None: function(x, keys, sizes, r, prefix)[: 1 if sizes is None else 2]

    compare(call(functional.merge_tokens), call(reference.merge_tokens), data)
    ours, theirs = (f(data["x"], keys, None, r, prefix)[2] for f in (op.merge_tokens, reference.merge_tokens))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "r", "prefix"), [(1, 0, 0), (2, 1, 0), (3, 1, 1), (50, 8, 1), (197, 16, 1), (198, 98, 2), (257, 128, 1)]
)
def test_tokens(compare, tokens, r, prefix, dtype):
    check(compare, tokens, r, prefix, dtype)


def test_sizes_of_one_are_not_read_and_registers_stay(compare):
    check(compare, 26, 5, 5, torch.float32, sizes=False, width=7)


@pytest.mark.parametrize("function", [reference.merge_tokens, op.merge_tokens])
def test_by_hand(function):
    """Of six tokens behind a class token, the third and the last-but-one are nearest to an odd one."""
    x = torch.tensor([[9.0], [1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])[None]
    e = torch.eye(4)
    keys = torch.stack([e[0], e[0], e[1], e[2], e[2], e[1] + e[3] / 4, e[3]])[None, None]
    sizes = torch.tensor([[1.0, 1, 1, 2, 1, 1, 1]])
    y, total, place = function(x, keys, sizes, 2, 1)
    torch.testing.assert_close(y[0, :, 0], torch.tensor([9.0, 1.0, (2.0 + 5) / 2, (2 * 3.0 + 4) / 3, 6.0]))
    assert total.tolist() == [[1, 1, 2, 3, 1]] and place.tolist() == [[0, 1, 2, 3, 3, 2, 4]]
    back = functional.unmerge_tokens(y, place)
    assert back.shape == x.shape and torch.equal(back[0, 2], back[0, 5])


@pytest.mark.parametrize("function", [reference.merge_tokens, op.merge_tokens])
def test_ties_go_to_the_earlier_token_and_equal_tokens_stay_as_they_are(function):
    x, keys = torch.full((1, 10, 5), 0.3), torch.ones(1, 2, 10, 4)
    y, total, place = function(x, keys, None, 3, 2)
    assert total.tolist() == [[1, 1, 4, 1, 1, 1, 1]]
    assert place.tolist() == [[0, 1, 2, 2, 2, 3, 2, 4, 5, 6]]
    torch.testing.assert_close(y, x[:, :7], rtol=0, atol=1e-7)


@pytest.mark.parametrize("function", [reference.merge_tokens, op.merge_tokens])
def test_what_does_not_fit_is_named(function):
    x, keys = torch.zeros(2, 9, 4), torch.zeros(2, 1, 9, 4)
    with pytest.raises(ValueError, match=r"5 of 9 tokens cannot merge: 1 never do, .* half at most \(4\)"):
        function(x, keys, None, 5, 1)
    with pytest.raises(ValueError, match=r"keys are \(2, 1, 8, 4\)"):
        function(x, keys[:, :, 1:], None, 1, 1)
    with pytest.raises(ValueError, match=r"sizes are \(2, 8\)"):
        function(x, keys, torch.ones(2, 8), 1, 1)


def test_a_nan_stays_in_its_image():
    x, keys = torch.randn(2, 20, 8), torch.randn(2, 1, 20, 8)
    keys[0, 0, 5] = torch.nan
    y, _, place = op.merge_tokens(x, keys, None, 4, 1)
    assert y.isfinite().all() and place.min() == 0 and place.max() == 15
    assert torch.equal(place[1], reference.merge_tokens(x[1:], keys[1:], None, 4, 1)[2][0])


def test_operator_for_compile_and_export():
    x, sizes = torch.randn(2, 21, 16, requires_grad=True), torch.ones(2, 21, requires_grad=True)
    torch.library.opcheck(torch.ops.nvit.merge_tokens.default, (x, torch.randn(2, 2, 21, 8), sizes, 5, 1))
