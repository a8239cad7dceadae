"""The dense model is a witness of its own label order; what it cannot tell is asked for."""

import pytest
import torch
from torch import nn

from nvit.training.labels import ask, interval, mapped, numberings, read_class_map

ELEVEN = [str(i) for i in range(11)]
PLACES = {name: i for i, name in enumerate(ELEVEN)}


class Table(nn.Module):
    """Answers with the class that is written in an image, in its own order of class names."""

    def __init__(self, order, right=1.0):
        super().__init__()
        self.p, self.order, self.right = nn.Parameter(torch.zeros(())), order, right

    def forward(self, images):
        out = torch.zeros(len(images), len(self.order))
        for row, image in zip(out, images, strict=True):
            name, coin = str(int(image[0])), float(image[1])
            row[self.order.index(name) if coin < self.right else int(coin * 1e6) % len(self.order)] = 1
        return out


def batches_of(class_to_idx):
    draw = torch.Generator().manual_seed(0)
    names = torch.randint(0, 11, (256,), generator=draw)
    images = torch.stack([names.float(), torch.rand(256, generator=draw)], 1)
    return [(images, torch.tensor([class_to_idx[str(int(n))] for n in names]))]


@pytest.mark.parametrize("order", ["lexical", "natural"])
def test_the_model_says_which_order_is_its_own(order):
    own = sorted(ELEVEN) if order == "lexical" else ELEVEN
    found, said = ask(Table(own), ELEVEN, numberings(ELEVEN, 11), batches_of(PLACES), 11)
    assert [n for n, _ in sorted(found.class_to_idx.items(), key=lambda item: item[1])] == own
    assert order in said and "100.0 % of 256 images" in said


def test_a_model_at_chance_stops_the_run_unless_accepted():
    model = Table(ELEVEN, right=0.0)
    with pytest.raises(ValueError, match="chance"):
        ask(model, ELEVEN, numberings(ELEVEN, 11, order="natural"), batches_of(PLACES), 11)
    _, said = ask(
        model,
        ELEVEN,
        numberings(ELEVEN, 11, order="natural"),
        batches_of(PLACES),
        11,
        accept=True,
    )
    assert "accepted as they are" in said


def test_orders_that_fit_alike_are_not_guessed():
    """Ten of eleven names stand elsewhere, so a model that is right on a third of images cannot have both orders; one
    that answers class 0 alone fits both."""

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(()))

        def forward(self, images):
            return nn.functional.one_hot((images[:, 0] != 0).long(), 11).float()

    def zeros(class_to_idx):
        images = torch.zeros(200, 2)
        return [(images, torch.full((200,), class_to_idx["0"]))]

    with pytest.raises(ValueError, match="about equally"):
        ask(Zero(), ELEVEN, numberings(ELEVEN, 11), zeros(PLACES), 11)


def test_names_that_sort_alike_are_not_a_question():
    (only,) = numberings(["cat", "dog"], 2)
    assert only.class_to_idx == {"cat": 0, "dog": 1}
    assert [n.how[:7] for n in numberings(ELEVEN, 11, order="lexical")] == ["lexical"]


def test_the_models_own_names_come_first_also_for_some_of_its_classes():
    own = {"cat": 2, "dog": 0, "owl": 1}
    (only,) = numberings(["owl", "cat"], 3, model_names=own)
    assert only.class_to_idx == {"cat": 2, "owl": 1} and "own label names" in only.how


def test_a_count_that_does_not_match_names_the_nearest_label():
    with pytest.raises(ValueError, match=r"2 class folders but the model has 3 classes.*'dgo'.*'dog' is"):
        numberings(["cat", "dgo"], 3, model_names={"cat": 0, "dog": 1, "owl": 2})


def test_a_misspelt_entry_of_a_class_map_drops_no_class(tmp_path):
    path = tmp_path / "map.txt"
    path.write_text("cat\ndgo\n")
    with pytest.raises(ValueError, match=r"class folder 'dog' is not in class map .*nearest entry is 'dgo'"):
        mapped(["cat", "dog"], read_class_map(path), str(path), 2)
    path.write_text("cat\ncat\n")
    with pytest.raises(ValueError, match="lists 'cat' twice"):
        read_class_map(path)
    path.write_text("owl\ncat\ndog\n")
    assert mapped(["cat", "dog"], read_class_map(path), str(path), 3).class_to_idx == {"cat": 1, "dog": 2}
    with pytest.raises(ValueError, match="up to 2; the model has 2"):
        mapped(["cat", "dog"], read_class_map(path), str(path), 2)


def test_the_interval_is_wilsons():
    low, high = interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)  # Newcombe 1998, table I: 81/263
