"""Training a compact model: it learns, keeps its shapes, follows the schedule, and resumes where it stopped."""

import math

import pytest
import torch

from nvit import FinetuneConfig, accuracy, finetune, tasks
from nvit.structure.compact import compact
from nvit.training.distill import Objective, frozen
from nvit.training.trainer import Trainer
from tests.hosts import images, labels, make, masked, prepared
from tests.runs import NoisyImages, Stop, TrainingData, same, stop_after, weights

SETTINGS = {"epochs": 3.0, "lr": 0.1, "min_lr": 0.001, "batch_size": 8, "distill_weight": 0.0, "save_every": 0.0}


def arguments(host: str = "plain", **more):
    config = FinetuneConfig(**(SETTINGS | more))
    small = compact(*masked(host, keep=0.6))
    return small, TrainingData(NoisyImages(), config.batch_size, config.seed), config


@pytest.mark.parametrize("host", ["plain", "deit_distilled", "registers", "average_pooling"])
def test_a_compact_model_learns_and_keeps_its_shapes(host):
    small, data, config = arguments(host, epochs=12.0, lr=0.2)
    shapes = {n: p.shape for n, p in small.named_parameters()}
    test = [(data.dataset.dataset.images, data.dataset.dataset.labels)]
    before = accuracy(small, test)
    trained = finetune(small, data, config)
    assert trained is small and not trained.training
    assert {n: p.shape for n, p in trained.named_parameters()} == shapes
    assert accuracy(trained, test)["loss"] < 0.5 * before["loss"]


@pytest.mark.parametrize(
    "more",
    [{}, {"ema": 0.9, "mixup": 0.8, "label_smoothing": 0.1}, {"optimizer": "momentum", "amp": "bf16"}],
    ids=str,
)
def test_an_interrupted_training_equals_the_uninterrupted_one(more, tmp_path):
    whole = finetune(*arguments(**more), state_file=tmp_path / "whole")
    for calls in (1, 4, 6):
        with pytest.raises(Stop):
            finetune(*arguments(**more), state_file=tmp_path / "s", resume=True, progress=stop_after(calls))
    resumed = finetune(*arguments(**more), state_file=tmp_path / "s", resume=True)
    assert same(weights(whole), weights(resumed))


def test_a_finished_training_does_no_more_steps(tmp_path):
    first = finetune(*arguments(), state_file=tmp_path / "s")
    again = finetune(*arguments(), state_file=tmp_path / "s", resume=True, progress=stop_after(0))
    assert same(weights(first), weights(again))


def test_the_rate_follows_a_cosine_scaled_by_the_batch(monkeypatch):
    rates = []
    step = Trainer.train_step

    def spy(self, *batch):
        rates.append(float(self.optimizer.param_groups[0]["lr"]))
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "train_step", spy)
    finetune(*arguments(epochs=4.0))
    high, low, total = 0.1 * 8 / 512, 0.001, 20
    assert len(rates) == total
    expected = [low + (high - low) * (1 + math.cos(math.pi * t / total)) / 2 for t in range(total)]
    assert rates == pytest.approx(expected)


def test_a_warm_up_comes_before_a_whole_cosine(monkeypatch):
    rates = []
    step = Trainer.train_step

    def spy(self, *batch):
        rates.append(float(self.optimizer.param_groups[0]["lr"]))
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "train_step", spy)
    finetune(*arguments(epochs=4.0, warmup_epochs=1.0, warmup_lr=1e-5, min_lr=1e-4))
    high, warm, total = 0.1 * 8 / 512, 5, 20
    expected = [1e-5 + (high - 1e-5) * t / warm for t in range(warm)]
    rest = total - warm
    expected += [1e-4 + (high - 1e-4) * (1 + math.cos(math.pi * t / rest)) / 2 for t in range(rest)]
    assert rates == pytest.approx(expected, rel=1e-5)
    assert rates[-1] < 1.2e-4, "the schedule ends at min_lr, not half-way"


def test_the_average_is_what_comes_back():
    small, data, config = arguments(ema=0.5, epochs=1.0)
    averaged = finetune(small, data, config)
    assert averaged is not small and not same(weights(averaged), weights(small))
    assert averaged(images(averaged)).shape == small(images(small)).shape


def test_the_teacher_pulls_the_student():
    """Its labels are noise; with distillation in charge the student ends closer to its teacher than it began."""
    teacher = frozen(prepared("plain")[0])
    small, data, config = arguments(distill_weight=100.0, distill_tau=1.0, epochs=10.0, lr=0.1)
    x = data.dataset.dataset.images

    def distance():
        with torch.no_grad():
            return float((small(x).softmax(-1) - teacher(x).softmax(-1)).abs().sum(-1).mean())

    before = distance()
    finetune(small, data, config, teacher=teacher)
    assert distance() < 0.7 * before


def test_weight_decay_spares_biases_and_norms():
    small, _, config = arguments()
    trainer = Trainer(small, Objective(tasks.of("auto", small)), config, config.lr, None)
    names = {id(p): n for n, p in small.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            name = names[id(p)]
            spared = p.ndim <= 1 or name in ("cls_token", "pos_embed")
            assert (group["weight_decay"] == 0) == spared, name


def test_a_loss_that_is_no_number_stops_with_the_step_and_keeps_the_state(tmp_path):
    small, _, config = arguments()
    data = TrainingData(NoisyImages(bad=frozenset(range(40))), 8, 0)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        finetune(small, data, config, state_file=tmp_path / "s")
    assert not list(tmp_path.iterdir())
    assert all(bool(torch.isfinite(p).all()) for p in small.parameters())


def test_gradients_of_a_step_are_the_objectives(tmp_path):
    small, _, config = arguments()
    twin = compact(*masked("plain", keep=0.6))
    x, y = images(small), labels(small, 3)
    trainer = Trainer(small, Objective(tasks.of("auto", small)), config, config.lr, None)
    before = weights(small)
    trainer.train_step(x, y)
    loss = Objective(tasks.of("auto", twin))(twin.eval(), x, y)
    loss.backward()
    assert trainer.look() == pytest.approx(loss.item())
    assert all(torch.equal(trainer.grads()[n], p.grad) for n, p in twin.named_parameters())
    assert trainer.step == 1 and not same(before, weights(small))


def test_an_unsupported_model_is_refused():
    _, data, config = arguments()
    with pytest.raises(ValueError, match="Linear is not supported"):
        finetune(torch.nn.Linear(2, 2), data, config)
    assert make("plain") is not None
