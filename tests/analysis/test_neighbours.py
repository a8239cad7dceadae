"""k-NN and a linear probe by hand and beside scikit-learn, and `nvit evaluate` of towers."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from nvit import adapters
from nvit.analysis.neighbours import Bank, cosine, features_of, knn, linear_probe, percent
from nvit.cli import main as cli
from nvit.structure import snapshot
from tests.hosts import images, make

HAND = Bank(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 1, 1]))


def bank(features, labels):
    return Bank(torch.tensor(features, dtype=torch.float32), torch.tensor(labels))


def clusters(seed, count=90, classes=3, width=6):
    """Noisy directions, of other lengths each."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(count) % classes
    noisy = centres[labels] + 0.9 * torch.randn(count, width, generator=g)
    return Bank(noisy * (0.5 + torch.rand(count, 1, generator=g)), labels)


def test_votes_by_hand():
    """Of (2, 0) the cosines are 1, 0.8, 0: one vote of e^(1/tau) against e^(0.8/tau) + 1."""
    asked = bank([[2.0, 0.0]], [0])
    assert knn(HAND, asked, k=1).tolist() == [True]
    assert knn(HAND, asked, k=3, tau=0.07).tolist() == [True]  # e^14.3 against e^11.4
    assert knn(HAND, asked, k=3, tau=1.0).tolist() == [False]  # 2.7 against 3.2
    assert knn(HAND, bank([[0.0, 3.0], [5.0, 0.1]], [1, 1])).tolist() == [True, False], "a bank below k votes whole"


def test_knn_votes_as_scikit_learns_does():
    neighbours = pytest.importorskip("sklearn.neighbors", reason="pip install 'nvit[probe]'")
    known, asked = clusters(0), clusters(1, count=300)
    weighed = neighbours.KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    told = weighed.fit(known.features.numpy(), known.labels.numpy()).predict(asked.features.numpy())
    right = knn(known, asked)
    assert right.tolist() == (told == asked.labels.numpy()).tolist()
    assert 60 < percent(right)[0] < 99, "neither easy nor hopeless"


def test_the_probe_is_scikit_learns_on_directions_of_unit_variance():
    pytest.importorskip("sklearn", reason="pip install 'nvit[probe]'")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    known, asked = clusters(0), clusters(1, count=300)
    pipeline = make_pipeline(Normalizer(), StandardScaler(), LogisticRegression(max_iter=200))
    told = pipeline.fit(known.features.numpy(), known.labels.numpy()).predict(asked.features.numpy())
    same = linear_probe(known, asked).numpy() == (told == asked.labels.numpy())
    assert same.mean() > 0.99  # it divides by n, we by n - 1
    with pytest.raises(ValueError, match="two classes at least"):
        linear_probe(bank([[1.0], [2.0]], [0, 0]), asked)


def test_cosine_and_percent_by_hand():
    assert cosine(bank([[1.0, 0.0], [1.0, 1.0]], [0, 1]), bank([[2.0, 0.0], [-1.0, 1.0]], [0, 1])) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="only features of one width can be compared: prune with --keep-output"):
        cosine(HAND, bank([[1.0]] * 3, [0, 1, 1]))
    top1, off = percent(torch.tensor([True, True, True, False]))
    assert top1 == 75 and off == pytest.approx(100 * (5 / 8 * 3 / 8 / 8) ** 0.5)


def test_features_are_those_chosen_and_several_tokens_are_their_mean():
    model = adapters.find(m := make("plain", num_classes=0)).prepare(m).train()
    x, y = images(model, 3), torch.tensor([2, 0, 1])
    found = features_of(adapters.choose_features_(model, "tokens"), [(x[:2], y[:2]), (x[2:], y[2:])])
    assert model.training and found.labels.tolist() == [2, 0, 1]
    with torch.no_grad():
        torch.testing.assert_close(found.features, model.eval().forward_features(x).mean(1), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="need a class number an image"):
        features_of(model, [x])
    with pytest.raises(ValueError, match="gave no image"):
        features_of(model, [])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tower, another one, and class folders whose images differ by their mean."""
    folder = tmp_path_factory.mktemp("towers")
    for seed, name in enumerate(("dense", "small")):
        model = make("plain", num_classes=0)
        if seed:
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        snapshot.save(folder / name, adapters.find(model).prepare(model), {})
    snapshot.save(folder / "classes", adapters.find(m := make("plain")).prepare(m), {})
    draws = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                path = folder / "data" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = draws.integers(0, 100, (16, 16, 3)) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def evaluate(world, model, *args):
    code = cli.main(["evaluate", str(world / model), *args, "--device", "cpu", "--out", str(world / "out")])
    result = world / "out" / "result.json"
    return code, json.loads(result.read_text()) if code == 0 else {}


def test_evaluate_gives_the_cosine_k_nn_and_a_probe(world, capsys):
    pytest.importorskip("sklearn", reason="pip install 'nvit[probe]'")
    named = ["--data", str(world / "data"), "--reference", str(world / "dense")]
    code, found = evaluate(world, "dense", *named, "--task", "features")
    assert code == 0 and found["cosine"] == pytest.approx(1, abs=1e-6) and found["images"] == 6
    assert found["knn"] == found["probe"] == 100 and found["knn_se"] > 0 and found["probe_se"] > 0
    said = capsys.readouterr()
    assert "k-NN %" in said.out and "linear probe %" in said.out and "left out" not in said.err
    by_choice = [evaluate(world, "small", *named, "--features", c)[1]["cosine"] for c in ("class", "pooled")]
    assert by_choice[0] != by_choice[1] and all(0.3 < c < 1 for c in by_choice)


LEFT_OUT = {
    "no reference": (("--data", "data"), "the cosine is left out", {"knn", "probe"}),
    "one side": (("--data", "data/val", "--reference", "dense"), "known and asked images are the same", {"cosine"}),
    "no classes": (
        ("--data", "data/train/cat", "--eval-data", "data/val/cat", "--reference", "dense"),
        "there are no class folders of known images",
        {"cosine"},
    ),
    "only the asked": (("--eval-data", "data", "--reference", "dense"), "of known images", {"cosine"}),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_left_out_is_said(world, case, capsys):
    args, said, given = LEFT_OUT[case]
    code, found = evaluate(world, "small", *(a if a.startswith("--") else str(world / a) for a in args))
    assert code == 0 and found.keys() & {"knn", "probe", "cosine"} == given
    assert said in capsys.readouterr().err


def test_a_probe_without_scikit_learn_is_one_line(world, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    code, found = evaluate(world, "small", "--data", str(world / "data"), "--reference", str(world / "dense"))
    assert code == 0 and found.keys() & {"knn", "probe", "cosine"} == {"knn", "cosine"}
    lines = [line for line in capsys.readouterr().err.splitlines() if "nvit[probe]" in line]
    assert lines == ["left out: a linear probe needs scikit-learn: pip install 'nvit[probe]'"]


@pytest.mark.parametrize(
    ("model", "args", "said"),
    [
        ("small", ("--data", "data/val"), "give reference (--reference DENSE)"),
        ("small", (), "--data is missing"),
        ("classes", ("--data", "data", "--reference", "dense"), "--reference is for task features"),
        ("small", ("--data", "data", "--reference", "classes"), "--reference is a classifier"),
    ],
)
def test_what_does_not_go_together_is_one_line(world, model, args, said, capsys):
    code, _ = evaluate(world, model, *(a if a.startswith("--") else str(world / a) for a in args))
    assert code == 1 and said in (err := capsys.readouterr().err)
    assert err.strip().splitlines()[-1].startswith("nvit: ")
