"""Images seen through fewer pixels: how many, how coarse, always the same ones, and a refit that has seen them."""

import pytest
import torch

from nvit.calibration.coarse import COARSEST, coarser
from nvit.config import PruneConfig


def noise(*sizes, side=56):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, side, side, generator=draw) for n in sizes]


def changed(before, after):
    return [not torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_images_loses_detail_and_the_others_nothing(share):
    batches = noise(*[50] * 8, side=28)
    after = list(coarser(batches, share))
    assert [x.shape for x in after] == [x.shape for x in batches]
    assert sum(changed(batches, after)) == pytest.approx(400 * share, abs=30 if share else 0)


def test_it_is_detail_that_goes_not_brightness():
    (sharp,), (blurred,) = noise(60), coarser(noise(60), 1.0)
    assert blurred.mean((1, 2, 3)).sub(sharp.mean((1, 2, 3))).abs().max() < 0.02
    left = blurred.var((1, 2, 3)) / sharp.var((1, 2, 3))  # of white noise about 1 / factor²
    assert left.max() < 1.05 and 0.5 / COARSEST**2 < left.min() < 2 / COARSEST**2
    assert left.std() > 0.1, "each by a factor of its own"


def test_the_same_images_each_time_and_others_by_another_seed():
    batches = noise(4, 7, 1)
    first, again, other = (list(coarser(batches, 0.5, seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert changed(batches, first) != changed(batches, other)


def test_odd_sizes_and_one_pixel():
    for side in ((1, 1), (3, 50)):
        (x,) = coarser([torch.ones(2, 1, *side)], 1.0)
        torch.testing.assert_close(x, torch.ones(2, 1, *side))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"coarse": 1.5, "refit": True}, r"coarse is 1\.5; it is a share of the calibration images, in \[0, 1\]"),
        ({"coarse": 0.5}, r"coarse 0\.5 is of the images that a refit sees; add --refit"),
    ],
)
def test_what_forbids_it_is_said(more, says):
    with pytest.raises(ValueError, match=says):
        PruneConfig(train=False, latency_target=0.8, **more).check()
