"""Loaders that users have: dicts, images alone, without a length."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import nvit
from tests.hosts import images, labels, make
from tests.runs import config, table

HOST = make("plain")
X, Y = images(HOST, 8).float(), labels(HOST, 8)


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


def pruned(loader, **more):
    model = make("plain")
    settings = config(train=False, latency_target=(0.8,), **more)
    return nvit.prune(model, loader, settings, table(model, settings)).masks


PAIRS = [(X[:4], Y[:4]), (X[4:], Y[4:])]
KINDS = {
    "dicts": [{"pixel_values": x, "labels": y} for x, y in PAIRS],
    "singular dicts": [{"image": x, "label": y} for x, y in PAIRS],
    "stream": DataLoader(Stream(), 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_loader_prunes_as_pairs_do(kind):
    expected = pruned(PAIRS, criterion="fisher", score_batches=2)
    for name, keep in pruned(KINDS[kind], criterion="fisher", score_batches=2).items():
        assert torch.equal(keep, expected[name]), name


@pytest.mark.parametrize(("criterion", "refit"), [("curvature", False), ("remaining", True), ("magnitude", False)])
def test_images_alone_are_enough_where_no_label_is_read(criterion, refit):
    alone = [x for x, _ in PAIRS]
    expected = pruned(PAIRS, criterion=criterion, refit=refit)
    for name, keep in pruned(alone, criterion=criterion, refit=refit).items():
        assert torch.equal(keep, expected[name]), name


def test_missing_labels_and_lengths_are_said_in_one_line():
    with pytest.raises(ValueError, match="reads labels, and none came with the images"):
        pruned([x for x, _ in PAIRS], criterion="fisher")
    with pytest.raises(ValueError, match="has no length, which is needed to score one pass; set images"):
        pruned(DataLoader(Stream(), 4), criterion="fisher", images=0)
    model, settings = make("plain"), config(latency_target=(0.9,))
    with pytest.raises(ValueError, match="reads labels, but the loader gives images alone"):
        nvit.prune(model, [x for x, _ in PAIRS], settings, table(model, settings))


def test_accuracy_reads_dicts_and_streams():
    model = make("plain").eval()
    expected = nvit.accuracy(model, PAIRS)["top1"]
    assert nvit.accuracy(model, KINDS["dicts"])["top1"] == expected
    assert nvit.accuracy(model, KINDS["stream"])["top1"] == expected
