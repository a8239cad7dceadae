"""Distances by schedule: the same as of whole models, and blocks that nothing changed before do not run."""

import pytest
import torch

from nvit import adapters, tasks
from nvit.prune import distances
from nvit.prune.distances import Distances
from nvit.tasks.nearness import Nearness
from tests.hosts import images, make

SCHEDULES = [(4, 3, 2), (4, 4, 1), (4, 4, 2), (5, 4, 1), (0, 0, 0), (0, 0, 3), (0, 0, 0), (4, 4, 1), (4, 4, 0)]


@pytest.fixture
def setting():
    model = make("deit_distilled", img_size=32, depth=3)
    near = Nearness(tasks.of("auto", model), model, [images(model, 3), images(model, 20, seed=1)])
    adapters.merge_(model, (4, 3, 2))
    return model, near


def counted(model):
    """How often every block ran."""
    runs = [0] * 3
    for i, block in enumerate(adapters.of(model).blocks(model)):
        block.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    return runs


@pytest.mark.parametrize("kept", [distances.KEPT, 1000])
def test_as_of_whole_models(setting, monkeypatch, kept):
    monkeypatch.setattr(distances, "KEPT", kept)
    model, near = setting
    of = Distances(model, near).of
    for merges in SCHEDULES:
        whole = near.of(adapters.merge_(model, merges))
        assert of(merges) == pytest.approx(whole, rel=1e-6, abs=1e-9), merges
        assert adapters.merges(model) == merges or not any(merges)


def test_blocks_before_the_first_that_differs_do_not_run(setting):
    model, near = setting
    runs, of, batches = counted(model), Distances(model, near).of, len(near.batches)
    assert batches == 3, "portions of at most 16 images"
    found = []
    for merges in SCHEDULES[:4]:
        before = list(runs)
        of(merges)
        found.append([(now - was) // batches for now, was in zip(runs, before, strict=True)])
    assert found == [[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]]


def test_what_is_kept_is_bounded(setting, monkeypatch):
    monkeypatch.setattr(distances, "KEPT", 1000)
    model, near = setting
    found = Distances(model, near)
    found.of((4, 3, 2))
    assert not found.last.outs
    found.of((4, 4, 1))
    assert not found.base.outs


class Prices:
    """A distance by schedule and batch, of a `Nearness` over so many batches of 16 images."""

    def __init__(self, model, near, price):
        self.near, self.seen = near, []
        near.batches, near.images = near.batches[1:2] * 12, 12 * 16
        near.total = lambda b, _: self.seen.append(b) or torch.tensor(16.0 * price(b, adapters.merges(model)))


def test_what_is_clearly_farther_is_not_looked_at_to_the_end(setting):
    """A third of the images tells a small difference that all of them show, and not one that chance would make."""
    model, near = setting
    chance = [(7 * b % 12 - 5.5) / 10 for b in range(12)]
    by = {
        (4, 3, 2): lambda b: 1 + b / 12,
        (4, 4, 1): lambda b: 1.01 + b / 12,
        (4, 2, 3): lambda b: 0.99 + b / 12,
        (5, 3, 2): lambda b: 1 + chance[b] + b / 12,
    }
    prices = Prices(model, near, lambda b, merges: by[merges](b))
    of = Distances(model, near)
    told, looks = {}, {}
    for merges, beside in (((4, 3, 2), None), *((m, (4, 3, 2)) for m in list(by)[1:])):
        prices.seen.clear()
        told[merges], looks[merges] = of.of(merges, beside), list(prices.seen)
        assert len(set(looks[merges])) == len(looks[merges])
    mean = 1 + 5.5 / 12
    assert told == {
        (4, 3, 2): pytest.approx(mean),
        (4, 4, 1): float("inf"),
        (4, 2, 3): pytest.approx(mean - 0.01),
        (5, 3, 2): pytest.approx(mean),
    }
    assert [len(seen) for seen in looks.values()] == [12, 4, 12, 12]
    assert looks[4, 4, 1] == [0, 6, 1, 7], "of both halves, since kinds of images come together"


def test_what_was_given_up_is_not_built_on(setting, monkeypatch):
    """The next schedule begins at what blocks put out for one that was looked at to the end."""
    model, near = setting
    near.batches, near.dense = near.batches[1:2] * 8, near.dense[1:2] * 8
    near.images = sum(map(len, near.batches))
    of, alone = Distances(model, near), Distances(model, near)
    first = of.of((4, 3, 2))
    with monkeypatch.context() as patched:
        patched.setattr(distances, "_farther", lambda *_: True)
        assert of.of((8, 4, 2), (4, 3, 2)) == float("inf") and not of.last.outs
    assert of.of((4, 3, 2)) == pytest.approx(first, rel=1e-6)
    assert of.of((8, 4, 1)) == pytest.approx(alone.of((8, 4, 1)), rel=1e-6)
