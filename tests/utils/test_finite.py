"""The first number that is not finite is named, also when nobody looked before others came."""

import pytest
import torch

from nvit.utils import devices
from nvit.utils.finite import Finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_is_named_with_its_value(bad, monkeypatch):
    monkeypatch.setattr(devices, "reading_is_free", lambda device: False)
    finite = Finite(torch.device("cpu"), lambda at, value: f"{value} at {at}")
    for place, value in enumerate((1.0, bad, 2.0, float("nan"))):
        finite.add(place, torch.tensor(value))
        finite.check_if_free()
    with pytest.raises(FloatingPointError, match=rf"^{bad} at 1$"):
        finite.check()


def test_another_number_counts_and_good_ones_pass():
    finite = Finite(torch.device("cpu"), lambda at, value: f"{value} at {at}")
    finite.add(torch.tensor(0), torch.tensor(1.0), torch.tensor(1e30))
    finite.check_if_free()
    finite.add(torch.tensor(1), torch.tensor(3.0), torch.tensor(float("inf")))
    with pytest.raises(FloatingPointError, match=r"^3.0 at 1$"):
        finite.check_if_free()
