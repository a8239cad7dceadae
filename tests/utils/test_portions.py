"""Batches as a device takes them, and what of them a refit holds back."""

import pytest
import torch

from nvit.refit.refit import _enter, first_held
from nvit.utils.devices import PORTION, portions
from tests.hosts import images, prepared

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, PORTION - 1, PORTION, PORTION + 1, 50, 64, 100])
def test_a_cpu_takes_few_at_once_and_about_as_many_each_time(count):
    x = torch.arange(float(count))
    parts = portions(x, CPU)
    assert torch.equal(torch.cat(tuple(parts)), x) and max(map(len, parts)) <= PORTION
    assert len(parts) == -(-count // PORTION) and max(map(len, parts)) - min(map(len, parts)) < len(parts)
    assert [len(p) for p in portions(x, torch.device("meta"))] == [count]
    assert not sum(map(len, portions(x[:0], CPU)))


def test_whole_batches_are_held_back():
    model = prepared("plain")[0]
    batches = [images(model, n, seed=n) for n in (20, 33, 5)]
    pair = _enter(model, model, batches, 0.2)
    sizes = [len(args[0]) for args, _ in pair.ours.inputs]
    assert first_held(3) == 2 and sum(sizes[: pair.first_held]) == 53 and sum(sizes[pair.first_held :]) == 5
