"""Eq. 8 and 9 against straight-line formulas, with and without a distillation token, hard labels and soft."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from nvit import adapters
from nvit.adapters import Logits
from nvit.tasks.classification import Classification
from nvit.training.distill import Objective, frozen, renormalisation
from tests import references
from tests.hosts import images, labels, masked, prepared

TASK = Classification(7)
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # fp64, a few hundred terms


def logits(seed: int, batch: int = 5, classes: int = 7) -> torch.Tensor:
    return torch.randn(batch, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


CLS, DIST, TEACHER, TEACHER_DIST = (logits(seed) for seed in range(4))
HARD, CNN = torch.tensor([0, 1, 2, 6, 6]), torch.tensor([3, 1, 0, 6, 2])
SOFT = logits(9).softmax(-1)


@pytest.mark.parametrize("tau", [1.0, 3.0, 20.0])
@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ((CLS, None), (TEACHER, None), [(CLS, TEACHER)]),
        ((CLS, DIST), (TEACHER, TEACHER_DIST), [(CLS, TEACHER), (DIST, TEACHER_DIST)]),
        ((CLS, DIST), (TEACHER, None), [(CLS, TEACHER), (DIST, TEACHER)]),
        ((CLS, None), (TEACHER, TEACHER_DIST), [(CLS, TEACHER)]),
    ],
)
def test_full_loss_is_eq_9(student, teacher, pairs, tau):
    expected = references.full_loss([s for s, _ in pairs], [t for _, t in pairs], tau)
    torch.testing.assert_close(TASK.distance(Logits(*student), Logits(*teacher), tau).double(), expected, **EXACT)


def test_full_loss_is_zero_at_the_teacher_and_has_no_gradient_there():
    student = CLS.clone().requires_grad_()
    loss = TASK.distance(Logits(student), Logits(CLS), 3.0)
    loss.backward()
    assert abs(loss.item()) < 1e-12 and student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("target", [HARD, SOFT])
@pytest.mark.parametrize("dist", [None, DIST])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_cnn_loss_is_eq_8(dist, target, share):
    expected = references.cnn_loss(CLS, dist, target, CNN, share)
    torch.testing.assert_close(TASK.loss(Logits(CLS, dist), target, CNN, hard_weight=share), expected, **EXACT)


def test_without_a_cnn_teacher_it_is_plain_cross_entropy_of_the_models_own_answer():
    for dist, answer in ((None, CLS), (DIST, (CLS + DIST) / 2)):
        for target in (HARD, SOFT):
            expected = references.cross_entropy(answer, target)
            torch.testing.assert_close(TASK.loss(Logits(CLS, dist), target), expected, **EXACT)


def test_smoothing_spreads_the_true_label_and_leaves_the_cnn_label_hard():
    smooth = F.one_hot(HARD, 7).double() * 0.9 + 0.1 / 7
    expected = references.cnn_loss(CLS, DIST, smooth, CNN, 0.5)
    torch.testing.assert_close(TASK.loss(Logits(CLS, DIST), HARD, CNN, smoothing=0.1), expected, **EXACT)


@pytest.mark.parametrize("host", ["plain", "deit_distilled"])
def test_objective_is_their_weighted_sum(host):
    model, teacher = (prepared(host, torch.float64, seed=s)[0] for s in (0, 5))
    cnn = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 7)).double()
    x, y = images(model), labels(model, 3)
    got = Objective(TASK, frozen(teacher), frozen(cnn), weight=10.0, tau=2.0, cnn_weight=0.3)(model, x, y)
    student, theirs = adapters.find(model).logits(model, x), adapters.find(model).logits(teacher, x)
    kl = references.full_loss([s for s in student if s is not None], [t for t in theirs if t is not None], 2.0)
    expected = 10.0 * kl + references.cnn_loss(*student, y, cnn(x).argmax(-1), 0.3)
    torch.testing.assert_close(got, expected, **EXACT)


def test_objective_reaches_only_the_student():
    model, teacher = prepared("deit_distilled")[0], prepared("deit_distilled", seed=5)[0]
    Objective(TASK, frozen(teacher), None)(model, images(model), labels(model, 3)).backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_a_masked_student_distils_from_its_dense_teacher():
    model, _, _ = masked("plain")
    loss = Objective(TASK, frozen(prepared("plain")[0]), None)(model, images(model), labels(model, 3))
    assert torch.isfinite(loss) and loss > 0


@pytest.mark.parametrize("host", ["plain", "deit_distilled", "average_pooling", "registers"])
@pytest.mark.parametrize("training", [False, True])
def test_logits_of_both_tokens_average_to_the_models_answer(host, training):
    model, _ = prepared(host)
    model.train(training)
    logits = adapters.find(model).logits(model, images(model))
    assert (logits.dist is not None) == (host == "deit_distilled")
    torch.testing.assert_close(logits.mean, model(images(model)))


def test_renormalised_images_are_what_the_teacher_would_have_read():
    student = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    teacher = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    raw = torch.rand(2, 3, 4, 4)

    def normal(data):
        mean, std = (torch.tensor(data[k]).view(3, 1, 1) for k in ("mean", "std"))
        return (raw - mean) / std

    scale, shift = renormalisation(student, teacher, "cpu")
    torch.testing.assert_close(normal(student) * scale + shift, normal(teacher))
    assert renormalisation(student, dict(student, mean=[0.5, 0.5, 0.5]), "cpu") is None


def test_any_timm_model_can_be_the_cnn_teacher():
    model, _ = prepared("deit_distilled", img_size=32)
    cnn = timm.create_model("resnet10t", num_classes=7)
    loss = Objective(TASK, None, frozen(cnn))(model, images(model), labels(model, 3))
    assert torch.isfinite(loss)


def test_sampled_labels_follow_the_softmax():
    row = torch.tensor([[0.0, 1.0, -1e9, 2.0]]).expand(20_000, -1)
    torch.manual_seed(0)
    counts = torch.bincount(TASK.draw(row), minlength=4) / 20_000
    # 4 standard deviations of a share of at most ½ over 20 000 draws
    torch.testing.assert_close(counts, row[0].softmax(-1), rtol=0, atol=0.015)
    assert counts[2] == 0
