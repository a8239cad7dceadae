import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvit_kernels import Kept


@given(st.lists(st.booleans(), min_size=1, max_size=64), st.randoms())
def test_index_is_a_permutation_with_the_kept_first(bits, random):
    mask = torch.tensor(bits)
    kept = Kept.all(len(bits)).update_(mask)
    n = int(kept.count)
    assert n == sum(bits) and kept.index.dtype == kept.count.dtype == torch.int32
    assert torch.equal(kept.index[:n].long(), mask.nonzero().squeeze(1))
    assert torch.equal(kept.index[n:].long(), (~mask).nonzero().squeeze(1))
    assert torch.equal(kept.indices(), mask.nonzero().squeeze(1)) and torch.equal(kept.mask, mask)


def test_an_update_moves_nothing():
    kept = Kept.from_mask(torch.arange(24) % 2 == 0)
    before = [t.data_ptr() for t in (kept.index, kept.count, kept.mask)]
    assert kept.update_(torch.arange(24) > 3) is kept and int(kept.count) == 20
    assert before == [t.data_ptr() for t in (kept.index, kept.count, kept.mask)]


def test_the_mask_given_is_copied():
    mask = torch.ones(8, dtype=torch.bool)
    kept = Kept.from_mask(mask)
    mask[:] = False
    assert int(kept.count) == 8 and kept.mask.all() and kept.to("cpu") is kept


@pytest.mark.parametrize(("mask", "match"), [
    (torch.ones(8), "expected a bool vector"), (torch.ones(2, 4, dtype=torch.bool), "expected a bool vector"),
    (torch.ones(7, dtype=torch.bool), "7 entries but this width has 8"),
])  # fmt: skip
def test_wrong_masks_are_refused(mask, match):
    with pytest.raises(ValueError, match=match):
        Kept.all(8).update_(mask)
