"""Paired differences with their uncertainty."""

import numpy as np
import pytest

from benchmarks.accuracy import paired


def test_paired_bootstrap_agrees_with_the_normal_interval():
    draws = np.random.default_rng(0)
    shared = draws.normal(size=2000)  # hard for both: it has to cancel
    a, b = shared + draws.normal(0.1, 0.2, size=2000), shared + draws.normal(0.0, 0.2, size=2000)
    found = paired.paired_bootstrap(a, b)
    half = 1.96 * (a - b).std() / 2000**0.5
    assert found.mean == pytest.approx((a - b).mean()) and found.significant and found.better == 1
    # 10 000 resamples know a 2.5 % quantile to about 2 % of a half width.
    assert found.low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.1 * half)


def test_paired_bootstrap_of_the_same_answers_says_nothing():
    right = np.arange(50) % 3 == 0
    found = paired.paired_bootstrap(right, right)
    assert (found.mean, found.low, found.high, found.better) == (0, 0, 0, 0.5) and not found.significant
    with pytest.raises(ValueError, match="the same images in both"):
        paired.paired_bootstrap(right, right[1:])
