"""The channel-order search: never worse, honest about its gain, and harmless to the function."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nvit_kernels import _native, sparse24
from nvit_kernels.sparse24 import permute
from nvit_kernels.sparse24.permute import kept_fraction, search_channel_order


def weights(*shape, seed=0, spread=1.0):
    """Rows that prefer some channels, as trained layers do."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * torch.exp(spread * torch.randn(shape[-1], generator=g))


def is_order(order, n):
    return torch.equal(order.sort().values, torch.arange(n))


@pytest.mark.parametrize("shape", [(24, 16), (96, 64), (64, 52)])
def test_gain_is_real_and_reported(shape):
    w = weights(*shape)
    found = search_channel_order(w, rounds=40)
    assert is_order(found.order, shape[1])
    assert found.kept_before == pytest.approx(kept_fraction(w), rel=1e-5)
    assert found.kept_after == pytest.approx(kept_fraction(w, found.order), rel=1e-5)
    assert found.kept_after > found.kept_before + 0.005


def test_finds_the_best_split_of_eight_channels():
    w = weights(12, 8, seed=3)
    found = search_channel_order(w, rounds=5)
    best = max(kept_fraction(w, torch.tensor(p)) for p in itertools.permutations(range(8)) if p[0] == 0)
    assert found.settled
    assert found.kept_after == pytest.approx(best, rel=1e-5)


def test_settles_where_no_two_groups_can_exchange():
    w = weights(16, 24, seed=1)
    found = search_channel_order(w, rounds=200)
    assert found.settled and found.rounds < 200
    again = search_channel_order(w[:, found.order], rounds=200)
    assert again.kept_after == pytest.approx(found.kept_after, rel=1e-6)


def test_channels_stay_in_their_span():
    w = weights(32, 48)
    found = search_channel_order(w, span=16, rounds=30)
    assert is_order(found.order, 48)
    assert torch.equal(found.order // 16, torch.arange(48) // 16)
    assert found.kept_after > found.kept_before
    alone = search_channel_order(w, span=4, rounds=30)  # nothing can move
    assert alone.settled and alone.kept_after == alone.kept_before


def test_several_readers_share_one_order():
    a, b = weights(40, 32, seed=1), weights(24, 32, seed=2)
    found = search_channel_order([a, b], rounds=20)
    assert found.kept_after == pytest.approx(kept_fraction(torch.cat((a, b)), found.order), rel=1e-5)
    arrays = search_channel_order([a.numpy(), np.asarray(b)], rounds=20)
    assert torch.equal(arrays.order, found.order)


def test_score_is_what_compression_keeps():
    w = weights(32, 64)
    found = search_channel_order(w, rounds=10)
    packed = sparse24.compress_2to4(w[:, found.order], dtype=torch.bfloat16)
    where = sparse24.unpack_bits(packed.bitmask)
    kept = (w[:, found.order].abs() * where).sum() / w.abs().sum()
    assert float(kept) == pytest.approx(found.kept_after, rel=1e-5)


def test_mlp_computes_the_same_function():
    fc1, bias, fc2, x = weights(32, 12), weights(32), weights(12, 32, seed=5), weights(7, 12, seed=6)
    order = search_channel_order(fc2, rounds=10).order
    before = F.linear(F.gelu(F.linear(x, fc1, bias)), fc2)
    after = F.linear(F.gelu(F.linear(x, fc1[order], bias[order])), fc2[:, order])
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-4 * float(before.abs().max()))


def test_time_is_bounded_and_progress_shown():
    seen = []
    found = search_channel_order(weights(256, 1024), seconds=0.5, progress=lambda used, kept: seen.append((used, kept)))
    assert found.seconds < 5  # one round more than the bound, on a busy machine
    assert len(seen) == found.rounds and 0 < seen[0][0] <= 1
    assert [kept for _, kept in seen] == sorted(kept for _, kept in seen)
    assert seen[-1][1] == pytest.approx(found.kept_after, rel=1e-5)


@pytest.mark.skipif(not _native.load().cpu, reason=_native.load().why_not_cpu or "compiled")
@pytest.mark.parametrize("rows", [1, 16, 45, 192])
def test_compiled_scores_equal_those_in_torch(rows):
    magnitudes = weights(rows, 40).abs().t().contiguous()
    octets = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i))[:8] for i in range(50)])
    compiled = torch.ops.nvit._split_scores(magnitudes, octets)
    torch.testing.assert_close(compiled, permute._split_scores_in_torch(magnitudes, octets), rtol=1e-5, atol=0)
    with pytest.raises((RuntimeError, ValueError), match="does not exist"):
        torch.ops.nvit._split_scores(magnitudes, octets + 40)


def test_every_pair_of_groups_meets_once():
    for groups in (2, 5, 8):
        turns = groups + groups % 2 - 1
        met = [tuple(sorted(p)) for t in range(turns) for p in permute._meetings(groups, t, 1).tolist()]
        assert sorted(met) == list(itertools.combinations(range(groups), 2))


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: search_channel_order(weights(4, 8), span=6), "span 6 does not fit 8 channels"),
        (lambda: search_channel_order(weights(4, 10)), "not a multiple of 4"),
        (lambda: search_channel_order([weights(4, 8), weights(4, 12)]), "do not read the same channels"),
        (lambda: search_channel_order(weights(4, 8) * float("nan")), "NaN or infinity"),
        (lambda: search_channel_order([]), "do not read the same channels"),
    ],
)
def test_refused_in_one_line(attempt, words):
    with pytest.raises(ValueError, match=words) as caught:
        attempt()
    assert "\n" not in str(caught.value)
