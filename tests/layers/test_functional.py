"""Operations on plain tensors: gathers and their gradients against dense zero-mask arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.pos_embed_sincos import apply_rot_embed_cat

from nvit.layers import functional
from nvit.layers.functional import Projection
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
        [Projection(mine["qkv.weight"], mine.get("qkv.bias"), index(rows), index(stream))],
        Projection(mine["proj.weight"], mine.get("proj.bias"), index(stream), index((head[:, None] & v).flatten())),
        heads=int(head.sum()),
        qk_dim=int(qk.sum()),
        v_dim=int(v.sum()),
        scale=dim**-0.5,
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
    full = functional.attention(x, [Projection(w)], Projection(p), attn_mask=mask, **widths)
    alone = functional.attention(x[:, :1], [Projection(w)], Projection(p), **widths)
    torch.testing.assert_close(full[:, :1], alone, **EXACT)
    free = functional.attention(x, [Projection(w)], Projection(p), **widths)
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
    expected = functional.attention(x, [Projection(w)], Projection(p), attn_mask=bias + added, **widths)
    for each in (bias, bias.unsqueeze(0)):
        got = functional.attention(x, [Projection(w)], Projection(p), bias=each, attn_mask=mask, **widths)
        torch.testing.assert_close(got, expected, **EXACT)


def test_mlp_with_masks_equals_mlp_with_zeros():
    x, w1, b1, w2, b2 = rand(2, 3, 6), rand(9, 6, seed=1), rand(9, seed=2), rand(6, 9, seed=3), rand(6, seed=4)
    emb, hidden = keep(6, 1), keep(9, 2)
    expected = F.linear(F.gelu(F.linear(x * emb, w1, b1)) * hidden, w2, b2)[..., emb]
    first = Projection(w1, b1, index(hidden), index(emb))
    last = Projection(w2, b2, index(emb), index(hidden))
    got = functional.mlp(x[..., emb], first, last, F.gelu)
    torch.testing.assert_close(got, expected, **EXACT)


def test_dense_operations_gather_nothing():
    w = rand(4, 4)
    assert functional.take(w) is w
    x = rand(1, 2, 4)
    assert functional.enter_stream(x, None) is x


# --- rotary position embedding ----------------------------------------------------------------------------------------

LAYOUTS = ["interleaved", "half"]


def pairs_of(dims: int, layout: str) -> torch.Tensor:
    """The two places of every pair, `(pairs, 2)`."""
    places = torch.arange(dims)
    return places.view(-1, 2) if layout == "interleaved" else places.view(2, -1).T


def rotary(layout: str, tokens: int = 5, dims: int = 12, prefix: int = 2, heads: tuple[int, ...] = ()):
    """A rotary embedding by random angles, and its table as timm holds it."""
    angles = rand(*heads, tokens, dims // 2, seed=7) * 3
    spread = torch.empty(*heads, tokens, dims, dtype=torch.float64)
    for place in pairs_of(dims, layout).T:
        spread[..., place] = angles
    return functional.Rotary(spread.sin(), spread.cos(), prefix), torch.cat([spread.sin(), spread.cos()], -1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotary_is_timms(layout, heads, dtype):
    """The table may be finer than the queries; the turn is rounded once, at the end, bit for bit as in timm."""
    rope, table = rotary(layout, heads=heads)
    x = rand(2, 3, 7, 12).to(dtype)
    got = rope(x, layout)
    assert got.dtype == dtype
    assert torch.equal(got[..., :2, :], x[..., :2, :]), "tokens without a place do not turn"
    assert torch.equal(got[..., 2:, :], apply_rot_embed_cat(x[..., 2:, :], table, half=layout == "half"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotary_turns_every_pair_by_its_angle(layout):
    rope, _ = rotary(layout)
    x, y = rand(2, 3, 7, 12), rand(2, 3, 7, 12, seed=1)
    first, second = (pairs_of(12, layout)[:, i] for i in (0, 1))

    def as_complex(t):
        return torch.complex(t[..., first], t[..., second])

    got = as_complex(rope(x, layout))[..., 2:, :]
    turn = torch.complex(rope.cos[..., first], rope.sin[..., first])
    torch.testing.assert_close(got, as_complex(x)[..., 2:, :] * turn, **EXACT)
    torch.testing.assert_close((rope(x, layout) * rope(y, layout)).sum(-1), (x * y).sum(-1), **EXACT)


@settings(max_examples=20)
@given(st.sampled_from(LAYOUTS), st.integers(0, 99), st.booleans())
def test_rotary_of_kept_pairs_is_cutting_after_the_turn(layout, seed, own_angles):
    rope, _ = rotary(layout, heads=(3,) if own_angles else ())
    x, kept, head = rand(2, 3, 7, 12, seed=seed), keep(6, seed), keep(3, seed + 1)
    dims = pairs_of(12, layout)[kept].flatten().sort().values
    narrow = rope.of(dims, index(head) if own_angles else None)
    torch.testing.assert_close(narrow(x[:, head][..., dims], layout), rope(x, layout)[:, head][..., dims], **EXACT)
    assert torch.equal(rope.of(None)(x, layout), rope(x, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pairs_gate_is_the_same_before_and_after_the_turn(layout):
    rope, _ = rotary(layout)
    q, k, pairs = rand(2, 3, 7, 12), rand(2, 3, 7, 12, seed=1), pairs_of(12, layout)

    def gate_gradients(before: bool):
        gate = torch.ones(6, dtype=torch.float64, requires_grad=True)
        spread = torch.ones(12, dtype=torch.float64)
        for place in pairs.T:
            spread = spread.index_put((place,), gate)
        turned = rope(q * spread, layout) if before else rope(q, layout) * spread
        (turned @ rope(k, layout).transpose(-1, -2)).softmax(-1).square().sum().backward()
        return gate.grad

    before, after = gate_gradients(True), gate_gradients(False)
    torch.testing.assert_close(before, after, **EXACT)
    assert before.abs().min() > 1e-6
    # Not so for one dim of a pair, which is why they leave together.
    alone = torch.zeros(12, dtype=torch.float64)
    alone[0] = 1
    assert not torch.allclose(rope(q * alone, layout), rope(q, layout) * alone)
