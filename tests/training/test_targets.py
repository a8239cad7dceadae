"""Tables of targets: read as they are, or refused by file and line; images without labels."""

import pytest
import torch

import nvit
from nvit.config import TrainingConfig
from nvit.training.targets import TargetImages, read_targets
from tests.hosts import make
from tests.training.test_folders import picture

GOOD = "file,age,height\na/1.png,1,2.5\nb.png,-3,4e1\n"


@pytest.fixture
def root(tmp_path):
    for i, name in enumerate(("a/1.png", "b.png", "c/2.png")):
        picture(tmp_path / "data" / name, value=20 * i, size=16)
    return tmp_path / "data"


def table(root, text: str):
    path = root.parent / "t.csv"
    path.write_text(text)
    return path


def test_a_table_is_read_in_its_order(root):
    files, targets = read_targets(table(root, GOOD), root, 2)
    assert [str(f.relative_to(root)) for f in files] == ["a/1.png", "b.png"]
    assert torch.equal(targets, torch.tensor([[1, 2.5], [-3, 40]]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,age\nb.png,1\n", r"has 2 columns \(file, age\); expected the file and one for each of the model's 2"),
        (GOOD + "c/2.png,1\n", "line 4 has 2 columns, its first line 3"),
        (GOOD + "c/2.png,1,tall\n", "line 4: 1, tall are not all numbers"),
        (GOOD + "gone.png,1,2\n", "line 4: there is no file .*gone.png"),
        (GOOD + "b.png,1,2\n", "lists .*b.png twice"),
        ("file,age,height\n", "lists no image"),
        ("", "has 0 columns"),
    ],
)
def test_a_line_that_does_not_fit_is_named(root, text, said):
    with pytest.raises(ValueError, match=said):
        read_targets(table(root, text), root, 2)


def test_what_is_evaluated_and_what_is_not(root):
    model, said = make("plain", num_classes=2), []
    known = {"model": model, "where": str(root), "say": said.append}
    good = str(table(root, GOOD))
    train = TargetImages(**known, targets=good)
    assert len(train.training(TrainingConfig(batch_size=1))) == 2
    assert train.evaluation(2) is None and "name images with --eval-data and --eval-targets" in said[-1]
    (batch,) = train.evaluation(2, own=True)
    assert batch[0].shape == (2, 3, 16, 16) and batch[1].shape == (2, 2)
    (batch,) = TargetImages(**known, evaluated_targets=good).evaluation(2)
    assert torch.equal(batch[1], torch.tensor([[1, 2.5], [-3, 40]]))
    with pytest.raises(ValueError, match="--targets is missing"):
        TargetImages(**known).training(TrainingConfig())
    with pytest.raises(ValueError, match="no such folder"):
        TargetImages(model=model, where="nowhere", targets=good).training(TrainingConfig())


def test_images_without_labels_may_lie_anywhere(root):
    said = []
    images = TargetImages(model=make("no_classifier"), where=str(root), labelled=False, say=said.append)
    assert len(images.training(TrainingConfig(batch_size=1))) == 3 and "3 images, without labels" in said[-1]
    (root / "broken.png").write_text("x")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        list(images.training(TrainingConfig(batch_size=1)))
    images = TargetImages(model=images.model, where=str(root), labelled=False, skip_broken=True, say=said.append)
    assert len(images.training(TrainingConfig(batch_size=1))) == 3 and "1 broken left out" in said[-1]
    assert nvit.accuracy(images.model, images.evaluation(2, own=True), reference=images.model)["images"] == 3
