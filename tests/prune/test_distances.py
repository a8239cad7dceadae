"""Distances by schedule: the same as of whole models, and blocks that nothing changed before do not run."""

import pytest

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
