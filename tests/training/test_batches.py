"""Loaders of every kind: pairs, dicts, images alone, without a length."""

import pytest
import torch

from nvit.training.batches import images_of, labelled, length, parts

X, Y = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        (X, Y, "more"),
        {"pixel_values": X, "labels": Y},
        {"image": X, "label": Y},
        {"images": X, "targets": Y},
    ],
)
def test_labelled_batches(batch):
    images, labels = labelled(batch)
    assert images is X and labels is Y


@pytest.mark.parametrize("batch", [X, (X,), [X], {"pixel_values": X}])
def test_images_alone(batch):
    images, labels = parts(batch)
    assert images is X and labels is None
    assert next(iter(images_of([batch]))) is X
    with pytest.raises(ValueError, match="images alone, but labels are read"):
        labelled(batch)


@pytest.mark.parametrize("batch", ["x", 3, {"a": X}, (), ("x", Y)])
def test_what_is_no_batch_is_named(batch):
    with pytest.raises(ValueError, match="expected images"):
        parts(batch)


def test_a_length_is_asked_for_where_it_is_needed():
    assert length([1, 2], "to resume") == 2
    with pytest.raises(ValueError, match="has no length, which is needed to resume"):
        length(iter([1]), "to resume")
