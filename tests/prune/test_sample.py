"""Calibration images: as many as asked, of any loader, spread over classes; too few for a refit are refused."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import nvit
from nvit import parallel
from nvit.prune import api
from nvit.prune.sample import count_batches, count_images, sampled
from nvit.training.data import TrainingData, calibration_data
from tests.runs import arguments, config, loader

X, Y = torch.arange(40.0)[:, None], torch.arange(40)


def read(found):
    return [int(i) for images, _ in found for i in images]


def settings(**more):
    return config(train=False, **more)


@pytest.mark.parametrize(("images", "sizes"), [(10, [8, 2]), (16, [8, 8]), (0, [8] * 5), (512, [8] * 5), (3, [3])])
def test_as_many_images_as_asked_the_last_batch_cut(images, sizes):
    data, asked = DataLoader(TensorDataset(X, Y), 8), settings(images=images)
    batches = list(sampled(data, asked))
    assert [len(i) for i, _ in batches] == [len(y) for _, y in batches] == sizes
    assert count_batches(data, asked) == len(sizes) and read(batches) == list(range(sum(sizes)))
    if images:
        assert count_images(data, asked) == sum(sizes)


def test_batches_may_still_be_counted():
    data = DataLoader(TensorDataset(X, Y), 8)
    assert [len(i) for i, _ in sampled(data, settings(score_batches=2, images=3))] == [8, 8]
    assert count_batches(data, settings(score_batches=9)) == 5


def test_images_alone_lists_and_streams_are_cut_too():
    alone = list(X.split(8))
    assert [len(b) if isinstance(b, torch.Tensor) else len(b[0]) for b in sampled(alone, settings(images=10))] == [8, 2]
    assert count_images(alone, settings(images=10)) == 10
    stream = (batch for batch in alone)
    assert count_batches(stream, settings(images=10)) == 0, "nobody knows"
    assert sum(len(b if isinstance(b, torch.Tensor) else b[0]) for b in sampled(stream, settings(images=10))) == 10


def test_the_command_takes_images_evenly_over_the_set_and_every_one_of_them():
    data = calibration_data(TensorDataset(X, Y), settings(images=10))
    assert isinstance(data, TrainingData) and sorted(read(data)) == list(range(0, 40, 4)) and len(data) == 2
    assert read(data) == read(data) != sorted(read(data)), "shuffled, the same at every pass"
    assert sorted(read(calibration_data(TensorDataset(X, Y), settings(images=0)))) == list(range(40))
    counted = settings(score_batches=2)
    training = TrainingData(TensorDataset(X, Y), counted.batch_size, counted.seed)
    assert read(calibration_data(TensorDataset(X, Y), counted)) == read(training), "as training gives them"


def test_of_several_ranks_none_is_left_without_a_share(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 4)
    data, asked = calibration_data(TensorDataset(X, Y), settings(images=17)), settings(images=17)
    assert len(data) == count_batches(data, asked) == 2, "the last image is nobody's"


def test_a_run_reads_so_many_images_and_no_more():
    model, _, asked, table = arguments(train=False, criterion="fisher", images=12, latency_target=(0.8,))
    seen = []
    nvit.prune(model, loader(asked), asked, table, progress=lambda done, total, text: seen.append((done, total, text)))
    assert [s for s in seen if s[2] == "score"] == [(1, 2, "score"), (2, 2, "score")]


@pytest.mark.parametrize("more", [{"score_batches": 1}, {"images": 8}, {"images": 5}])
def test_too_few_batches_for_a_refit_are_refused_before_anything(more, monkeypatch):
    model, data, asked, table = arguments(train=False, refit=True, **more)
    monkeypatch.setattr(api, "Pruner", lambda *_, **__: pytest.fail("something was done"))
    with pytest.raises(ValueError, match=r"a refit needs 2 batches .* this run has 1; give more images"):
        nvit.prune(model, data, asked, table)


@pytest.mark.parametrize("train", [True, False])
def test_a_target_below_the_smallest_model_is_refused_before_anything(train):
    model, _, asked, table = arguments(latency_target=(0.8, 0.05), only=("mlp",), train=train)

    def unread():
        raise AssertionError("an image was read")
        yield

    with pytest.raises(ValueError, match=r"latency target 0\.05 of dense cannot be met: the smallest allowed widths"):
        nvit.prune(model, unread(), asked, table)
    assert not model.training or train


def test_a_loop_by_hand_is_refused_at_its_first_step_and_scoring_alone_is_not():
    model, data, asked, table = arguments(latency_target=(0.05,), only=("mlp",))
    pruner = nvit.Pruner(model, table, asked)
    x, y = next(iter(data))
    pruner.score(x, y)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=r"latency target 0\.05 of dense cannot be met"):
        pruner.step()
