"""Transposable masks: valid both ways and the best there is."""

import pytest
import torch

from nvit_kernels import sparse24
from nvit_kernels.sparse24.transposable import patterns, transposable_mask


def greedy(tile):
    """The largest first, while its row and column have room."""
    kept = torch.zeros(4, 4, dtype=torch.bool)
    for i in tile.abs().flatten().argsort(descending=True).tolist():
        if kept[i // 4].sum() < 2 and kept[:, i % 4].sum() < 2:
            kept[i // 4, i % 4] = True
    return kept


def test_patterns_leave_no_room():
    every = patterns()
    assert len({tuple(p.flatten().tolist()) for p in every}) == len(every) == 186
    assert (every.sum((1, 2)) == 8).sum() == 90
    for p in every:
        assert p.sum(0).max() <= 2 and p.sum(1).max() <= 2
        for r, c in (~p).nonzero().tolist():
            assert p[r].sum() == 2 or p[:, c].sum() == 2


def test_at_most_two_of_four_both_ways():
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    mask = transposable_mask(w)
    for m in (mask, mask.T):
        assert (m.unflatten(1, (-1, 4)).sum(2) <= 2).all()
    packed = sparse24.compress_2to4(w, mask, dtype=torch.float16)
    turned = sparse24.compress_2to4(w.T, mask.T, dtype=torch.float16)
    there = sparse24.decompress_2to4(packed.values, packed.meta)
    assert torch.equal(there, torch.where(mask, w, 0).half())
    assert torch.equal(there, sparse24.decompress_2to4(turned.values, turned.meta).T)


def test_keeps_at_least_what_greedy_keeps():
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    mask, total = transposable_mask(w), w.abs().sum()
    by_greed = torch.zeros_like(mask)
    for r in range(0, 256, 4):
        for c in range(0, 256, 4):
            tile = w[r : r + 4, c : c + 4]
            by_greed[r : r + 4, c : c + 4] = greedy(tile)
            ours = (tile.abs() * mask[r : r + 4, c : c + 4]).sum()
            assert ours >= (tile.abs() * by_greed[r : r + 4, c : c + 4]).sum() * (1 - 1e-6)
    kept, greedily = float((w.abs() * mask).sum() / total), float((w.abs() * by_greed).sum() / total)
    by_rows = float((w.abs() * sparse24.mask_2to4(w)).sum() / total)
    assert greedily + 0.005 < kept < by_rows
    assert kept == pytest.approx(0.703, abs=0.005)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (4,)])
def test_refused_in_one_line(shape):
    with pytest.raises(ValueError, match="expected multiples of 4 both ways"):
        transposable_mask(torch.randn(shape))
