"""Operations on plain tensors: gathers and their gradients against dense zero-mask arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nvit import functional
from tests.references import masked_attention, masked_layer_norm

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # fp64, sums of a hundred terms in another order


def rand(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def keep(size: int, seed: int) -> torch.Tensor:
    mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[seed % size] = True
    return mask


def index(mask: torch.Tensor) -> torch.Tensor:
    return mask.nonzero().squeeze(1)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("cols", [False, True])
def test_take_is_indexing_and_passes_gradcheck(rows, cols):
    w = rand(6, 5).requires_grad_()
    r, c = (index(keep(n, n)) if on else None for n, on in ((6, rows), (5, cols)))
    expected = w[torch.arange(6) if r is None else r][:, torch.arange(5) if c is None else c]
    assert torch.equal(functional.take(w, r, c), expected)
    assert torch.autograd.gradcheck(lambda w: functional.take(w, r, c), (w,))


@settings(max_examples=20)
@given(st.integers(0, 99))
def test_linear_equals_a_product_with_zero_masks(seed):
    x, w, b = rand(2, 3, 8, seed=seed), rand(7, 8, seed=seed + 1), rand(7, seed=seed + 2)
    out, inn = keep(7, seed), keep(8, seed + 3)
    expected = F.linear(x * inn, w, b)[..., out]
    got = functional.linear(x[..., inn], w, b, index(out), index(inn))
    torch.testing.assert_close(got, expected, **EXACT)
    torch.testing.assert_close(functional.linear(x[..., inn], w, None, None, index(inn)), F.linear(x * inn, w), **EXACT)


@settings(max_examples=20)
@given(st.integers(0, 99))
def test_kept_layer_norm_counts_kept_channels(seed):
    x, w, b, mask = rand(2, 3, 9, seed=seed), rand(9, seed=seed + 1), rand(9, seed=seed + 2), keep(9, seed)
    for bias in (b, None):
        expected = masked_layer_norm(x, w, bias, mask, 1e-3)[..., mask]
        got = functional.kept_norm(x[..., mask], w, bias, index(mask), 1e-3)
        torch.testing.assert_close(got, expected, **EXACT)


@settings(max_examples=25)
@given(st.integers(0, 999), st.booleans())
def test_attention_with_masks_equals_attention_with_zeros_and_so_do_its_gradients(seed, bias):
    heads, dim, emb = 3, 4, 10
    head, qk, v, stream = keep(heads, seed), keep(dim, seed + 1), keep(dim, seed + 2), keep(emb, seed + 3)
    w = {"qkv.weight": rand(3 * heads * dim, emb, seed=seed), "proj.weight": rand(emb, heads * dim, seed=seed + 5)}
    if bias:
        w |= {"qkv.bias": rand(3 * heads * dim, seed=seed + 6), "proj.bias": rand(emb, seed=seed + 7)}
    mine, theirs = ({n: t.clone().requires_grad_() for n, t in w.items()} for _ in range(2))
    x = rand(2, 5, emb, seed=seed + 8) * stream
    rows = torch.cat([(head[:, None] & m).flatten() for m in (qk, qk, v)])
    got = functional.attention(
        x[..., stream],
        [(mine["qkv.weight"], mine.get("qkv.bias"), index(rows))],
        mine["proj.weight"],
        mine.get("proj.bias"),
        heads=int(head.sum()),
        qk_dim=int(qk.sum()),
        v_dim=int(v.sum()),
        scale=dim**-0.5,
        emb=index(stream),
        proj_cols=index((head[:, None] & v).flatten()),
    )
    exact = masked_attention(x, theirs, heads, dim, head, qk, v)[..., stream]
    torch.testing.assert_close(got, exact, **EXACT)
    got.square().sum().backward()
    exact.square().sum().backward()
    for name in w:
        ours, dense = mine[name].grad, theirs[name].grad
        kept = ours != 0
        torch.testing.assert_close(ours[kept], dense[kept], rtol=1e-8, atol=1e-10)
        if name == "qkv.weight":
            assert not ours[~rows].any() and not ours[:, ~stream].any(), "a pruned weight has a gradient"


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_attention_mask_reaches_the_logits(kind):
    x, w, p = rand(1, 4, 6), rand(18, 6, seed=1), rand(6, 6, seed=2)
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    mask = allowed if kind == "boolean" else torch.zeros(4, 4, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    widths = {"heads": 2, "qk_dim": 3, "v_dim": 3, "scale": 0.5}
    full = functional.attention(x, [(w, None, None)], p, None, attn_mask=mask, **widths)
    alone = functional.attention(x[:, :1], [(w, None, None)], p, None, **widths)
    torch.testing.assert_close(full[:, :1], alone, **EXACT)
    free = functional.attention(x, [(w, None, None)], p, None, **widths)
    assert not torch.allclose(full[:, :1], free[:, :1])
    torch.testing.assert_close(full[:, 3:], free[:, 3:], **EXACT)


@pytest.mark.parametrize("kind", ["none", "boolean", "windows", "windows of every image", "heads"])
def test_a_position_bias_joins_any_mask(kind):
    """Against one additive mask for every window and head; windows of an image follow one another in the batch."""
    x, w, p, bias = rand(6, 4, 6), rand(18, 6, seed=1), rand(6, 6, seed=2), rand(2, 4, 4, seed=3)
    masks = {
        "none": None,
        "boolean": torch.ones(4, 4, dtype=torch.bool).tril(),
        "windows": rand(3, 1, 4, 4, seed=4),
        "windows of every image": rand(6, 1, 4, 4, seed=4),
        "heads": rand(2, 4, 4, seed=4),
    }
    mask = masks[kind]
    added = torch.zeros(6, 2, 4, 4, dtype=torch.float64) if mask is None else mask
    if kind == "boolean":
        added = torch.zeros(4, 4, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    elif kind == "windows":
        added = torch.cat([mask, mask])
    widths = {"heads": 2, "qk_dim": 3, "v_dim": 3, "scale": 0.5}
    expected = functional.attention(x, [(w, None, None)], p, None, attn_mask=bias + added, **widths)
    for each in (bias, bias.unsqueeze(0)):
        got = functional.attention(x, [(w, None, None)], p, None, bias=each, attn_mask=mask, **widths)
        torch.testing.assert_close(got, expected, **EXACT)


def test_mlp_with_masks_equals_mlp_with_zeros():
    x, w1, b1, w2, b2 = rand(2, 3, 6), rand(9, 6, seed=1), rand(9, seed=2), rand(6, 9, seed=3), rand(6, seed=4)
    emb, hidden = keep(6, 1), keep(9, 2)
    expected = F.linear(F.gelu(F.linear(x * emb, w1, b1)) * hidden, w2, b2)[..., emb]
    got = functional.mlp(x[..., emb], w1, b1, w2, b2, F.gelu, emb=index(emb), hidden=index(hidden))
    torch.testing.assert_close(got, expected, **EXACT)


def test_dense_operations_gather_nothing():
    w = rand(4, 4)
    assert functional.take(w) is w
    x = rand(1, 2, 4)
    assert functional.enter_stream(x, None) is x
