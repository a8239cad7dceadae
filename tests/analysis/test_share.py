"""Standard errors of accuracies."""

import numpy as np
import pytest

from nvit.analysis.share import kept
from nvit.tasks.classification import standard_error
from nvit.utils.report import _cell


@pytest.mark.parametrize(("percent", "images"), [(80.0, 1300), (50.0, 200), (90.0, 360)])
def test_it_is_the_deviation_of_what_samples_say(percent, images):
    draws = np.random.default_rng(0).binomial(images, percent / 100, 20000) * 100 / images
    assert standard_error(percent, images) == pytest.approx(draws.std(), rel=0.05)


def test_none_of_a_few_is_not_certainty():
    assert standard_error(0.0, 20) > 4 and standard_error(100.0, 20) > 4


def test_a_result_keeps_it_under_the_accuracys_own_name():
    found = {"top1": 80.0, "top1_se": 1.1, "top5": 90.0}
    assert kept(found, "top1") == {"top1": 80.0, "top1_se": 1.1}
    assert kept(found, "top1", "top1_before") == {"top1_before": 80.0, "top1_before_se": 1.1}
    assert kept(None, "top1") == {"top1": None} and kept({"mae": 2.0, "r2": 0.5}, "mae") == {"mae": 2.0}


def test_tables_show_it():
    assert _cell({"top1": 80.0, "top1_se": 1.11}, "top1") == "80.00 ± 1.11"
    assert _cell({"measured_ratio": 0.5, "measured_spread": 0.004}, "measured_ratio") == "0.500 ± 0.004"
    assert _cell({"top1": 80.0}, "top1") == "80.00" and _cell({"top1": None, "top1_se": None}, "top1") == "–"
