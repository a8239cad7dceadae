"""Every task: loss, distance, draws, probes and meter against formulas written out, and labels that are not its own."""

import math

import numpy as np
import pytest
import torch

from nvit import tasks
from nvit.adapters import Logits
from nvit.config import FinetuneConfig, PruneConfig
from nvit.tasks import TASKS
from nvit.tasks.classification import Classification
from nvit.tasks.features import Features
from nvit.tasks.multilabel import MultiLabel
from nvit.tasks.regression import Regression
from tests.families import hf
from tests.hosts import make

G = torch.Generator().manual_seed(0)
OUT, OTHER = (torch.randn(6, 5, generator=G, dtype=torch.float64) * 2 for _ in range(2))
EXACT = {"rtol": 1e-10, "atol": 1e-12}
HEADED = {"multilabel": MultiLabel(5), "regression": Regression(5), "features": Features(0)}
EACH = {"classification": Classification(5)} | HEADED


def labels_of(name: str) -> torch.Tensor:
    if name == "classification":
        return torch.tensor([0, 4, 2, 1, 3, 3])
    return (OTHER > 0).double() if name == "multilabel" else OTHER


def test_losses_by_hand():
    p, y = OUT.sigmoid(), labels_of("multilabel")
    by_hand = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    torch.testing.assert_close(MultiLabel(5).loss(Logits(OUT), y), by_hand, **EXACT)
    torch.testing.assert_close(Regression(5).loss(Logits(OUT), OTHER), (OUT - OTHER).square().mean(), **EXACT)
    cosine = (OUT * OTHER).sum(1) / OUT.norm(dim=1) / OTHER.norm(dim=1)
    torch.testing.assert_close(Features(0).loss(Logits(OUT), OTHER), (2 - 2 * cosine).mean(), **EXACT)


def test_a_bernoulli_distance_by_hand():
    p, q = (OTHER / 3).sigmoid(), (OUT / 3).sigmoid()
    by_hand = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(MultiLabel(5).distance(Logits(OUT), Logits(OTHER), 3.0), by_hand, **EXACT)


@pytest.mark.parametrize("task", EACH.values(), ids=EACH)
def test_a_model_is_at_no_distance_from_itself_and_pulled_nowhere(task):
    own = OUT.clone().requires_grad_()
    task.distance(Logits(own), Logits(OUT), 3.0).backward()
    assert float(own.grad.abs().max()) < 1e-12
    assert float(task.distance(Logits(OTHER), Logits(OUT), 3.0)) > 1e-3


@pytest.mark.parametrize("task", EACH.values(), ids=EACH)
def test_a_probe_has_the_second_moment_of_the_loss_hessian(task):
    z = OUT[:1]
    target = {"features": z.clone()}.get(task.name, labels_of(task.name)[:1])
    hessian = torch.autograd.functional.hessian(lambda v: task.loss(Logits(v[None]), target), z[0])
    draws = task.probe(z.expand(60_000, -1), torch.Generator().manual_seed(1)).double()
    off = (draws.T @ draws / len(draws) - hessian).abs().max() / hessian.abs().max()
    assert off < 0.03, off


@pytest.mark.parametrize("task", EACH.values(), ids=EACH)
def test_drawn_labels_pull_nowhere_on_average(task):
    """They come from what the model says: gradients have mean 0, and their square is the Fisher information."""
    torch.manual_seed(0)
    z = OUT[:1].expand(60_000, -1).clone().requires_grad_()
    drawn = task.draw(z)
    (task.loss(Logits(z), drawn) * len(z)).backward()
    mean, spread = z.grad.mean(0), z.grad.std(0) / math.sqrt(len(z))
    assert float((mean / spread.clamp(min=1e-12)).abs().max()) < 5 and float(spread.max()) > 0


@pytest.mark.parametrize("task", EACH.values(), ids=EACH)
def test_rows_of_a_batch_draw_what_the_whole_batch_draws(task):
    torch.manual_seed(3)
    whole = task.draw(OUT)
    torch.manual_seed(3)
    assert torch.equal(task.draw(OUT[[1, 4]], [1, 4], 6), whole[[1, 4]])


def test_meters_by_hand():
    found = Regression(5).meter()
    found.add(OUT[:2], OTHER[:2])
    found.add(OUT[2:], OTHER[2:])
    x, y = OUT.numpy(), OTHER.numpy()
    r2 = 1 - ((x - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    expected = {"mae": abs(x - y).mean(), "rmse": ((x - y) ** 2).mean() ** 0.5, "r2": r2, "loss": ((x - y) ** 2).mean()}
    assert found.value() == pytest.approx(expected)
    cosine = Features(0).meter()
    cosine.add(OUT, 3 * OUT)
    assert cosine.value() == {"cosine": pytest.approx(1.0)}


@pytest.mark.parametrize("occurring", [(0, 1, 2, 3, 4), (1, 3), (2,)])
def test_average_precision_by_hand(occurring):
    """Over the classes that occur: the mean, at every image that has a class, of how many ranked so far have it."""
    yes = torch.zeros(6, 5)
    for c in occurring:
        yes[[c % 3, 3 + c % 3], c] = 1.0
    meter = MultiLabel(5).meter()
    meter.add(OUT[:4].float(), yes[:4])
    meter.add(OUT[4:].float(), yes[4:])
    by_hand = []
    for c in occurring:
        ranked = yes[:, c][OUT[:, c].argsort(descending=True)].numpy()
        by_hand.append((np.cumsum(ranked) / np.arange(1, 7))[ranked > 0].mean())
    found = meter.value()
    assert found["mAP"] == pytest.approx(100 * np.mean(by_hand))
    assert found["accuracy"] == pytest.approx(100 * float(((OUT > 0) == yes.bool()).float().mean()))


def test_no_class_that_occurs_is_no_precision():
    meter = MultiLabel(5).meter()
    meter.add(OUT.float(), torch.zeros(6, 5))
    assert math.isnan(meter.value()["mAP"])


X = torch.zeros(6, 3, 8, 8)


@pytest.mark.parametrize(
    ("task", "wrong", "said"),
    [
        (Classification(5), torch.tensor([0, 1, 2, 3, 4, 5]), "a label is 5, but the model has 5 classes"),
        (Classification(5), torch.tensor([0, -1, 2, 3, 4, 4]), "a label is -1"),
        (Classification(5), (OTHER > 0).float(), "take --task multilabel"),
        (Classification(5), (OTHER > 0).long(), "take --task multilabel"),
        (Classification(5), torch.rand(6), "for numbers --task regression"),
        (Classification(5), None, "give a loader of \\(images, labels\\)"),
        (MultiLabel(5), torch.tensor([0, 1, 2, 3, 4, 4]), "take --task classification"),
        (MultiLabel(5), 2 * (OTHER > 0).float(), "a label is 2; task multilabel expects 0 to 1"),
        (MultiLabel(5), torch.full((6, 5), math.nan), "expects 0 to 1"),
        (Regression(5), torch.zeros(6), r"labels are \(6,\); task regression expects .*\(6, 5\)"),
        (Regression(5), torch.full((6, 5), math.inf), "not finite"),
    ],
)
def test_labels_of_another_task_are_refused_in_a_line(task, wrong, said):
    with pytest.raises(ValueError, match=said) as e:
        task.labels(X, wrong)
    assert "\n" not in str(e.value)


def test_labels_in_their_usual_forms():
    assert Classification(5).labels(X, torch.tensor([0, 1, 2, 3, 4, 4], dtype=torch.int32)).dtype == torch.int64
    assert Classification(5).labels(X, OTHER.softmax(-1)).shape == (6, 5)
    assert MultiLabel(1).labels(X, torch.tensor([0, 1, 1, 0, 0, 1])).shape == (6, 1)
    numbers = Regression(1).labels(X, torch.arange(6))  # broadcast against (6, 1) they would be 36 errors
    assert numbers.shape == (6, 1) and numbers.dtype == torch.float32
    assert Features(0).labels(X, None).shape == (6, 0)


@pytest.mark.parametrize("name", ["multilabel", "regression", "features"])
@pytest.mark.parametrize("field", ["cnn_teacher", "label_smoothing", "mixup", "cutmix"])
def test_what_goes_with_class_numbers_alone_is_refused(name, field):
    config = FinetuneConfig(**{field: "resnet18" if field == "cnn_teacher" else 0.5})
    with pytest.raises(ValueError, match=f"{field} goes with class numbers, which task {name} has not"):
        HEADED[name].check(config)


def test_features_are_refused_where_they_say_nothing():
    with pytest.raises(ValueError, match="prune with --no-train"):
        Features(0).check(PruneConfig())
    Features(0).check(PruneConfig(train=False))
    with pytest.raises(ValueError, match="distill_weight must not be 0"):
        Features(0).check(FinetuneConfig(distill_weight=0.0))


def test_a_head_tells_the_task_or_is_asked_about():
    assert tasks.infer(make("plain")) == "classification"
    assert tasks.infer(make("no_classifier")) == "features"
    with pytest.raises(ValueError, match="one output and does not say what for; take --task regression"):
        tasks.infer(make("plain", num_classes=1))
    for name in ("regression", "multilabel"):
        assert tasks.of(name, make("plain", num_classes=1)).name == name
    with pytest.raises(ValueError, match="classification needs 2 outputs"):
        tasks.of("classification", make("plain", num_classes=1))
    with pytest.raises(ValueError, match="take --task features"):
        tasks.of("regression", make("no_classifier"))
    with pytest.raises(ValueError, match=r"reset_classifier\(0\)"):
        tasks.of("features", make("plain"))


@pytest.mark.skipif(not hf.HERE, reason="transformers is missing")
def test_a_hugging_face_config_tells_the_task():
    assert tasks.infer(hf.make("vit")) == "classification"
    assert tasks.infer(hf.make("vit", num_labels=1)) == "regression"  # as transformers itself reads it
    for theirs, ours in {"multi_label_classification": "multilabel", "regression": "regression"}.items():
        assert tasks.infer(hf.make("vit", problem_type=theirs)) == ours


def test_every_task_is_a_flag():
    from typing import get_args

    from nvit.config import TaskName

    assert get_args(get_args(TaskName)[0]) == ("auto", *TASKS)
