"""Pruning, refitting, training and evaluating models whose outputs are no classes."""

import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import nvit
from nvit import tasks
from nvit.prune.pruner import Pruner
from tests.hosts import make
from tests.runs import table

OUTPUTS = {"multilabel": 4, "regression": 1, "features": 0}
CONFIG = nvit.PruneConfig(train=False, latency_target=0.7, batch_size=6, bundle_heads=1, bundle_mlp=4)


def data(task: str, count: int = 24) -> DataLoader:
    g = torch.Generator().manual_seed(4)
    x = torch.randn(count, 3, 16, 16, generator=g)
    if task == "multilabel":
        return DataLoader(TensorDataset(x, torch.randint(2, (count, 4), generator=g)), 6)
    return DataLoader(TensorDataset(x, torch.randn(count, generator=g)), 6)


def host(task: str):
    return make("plain", num_classes=OUTPUTS[task])


def pruned(task: str, **more) -> nvit.PruneResult:
    model, config = host(task), dataclasses.replace(CONFIG, **({"task": task} | more))
    return nvit.prune(model, data(task), config, table(model, config))


@pytest.mark.parametrize("criterion", ["hessian", "fisher", "curvature", "remaining"])
@pytest.mark.parametrize("task", OUTPUTS)
def test_scores_follow_the_loss_of_the_task(task, criterion):
    """Units are told apart, and another head makes others leave; with a softmax of one class none did."""
    gone = []
    for quiet in (slice(24), slice(24, None)):  # half of the head's inputs hardly count
        model, config = host(task), dataclasses.replace(CONFIG, task=task, criterion=criterion)
        if task != "features":
            with torch.no_grad():
                model.head.weight[:, quiet] *= 0.01
        pruner = Pruner(model, table(model, config), config)
        for x, y in data(task):
            pruner.score(x, y)
        scores = torch.cat(list(pruner.scores().values()))
        assert bool(scores.isfinite().all()) and len(scores.unique()) > len(scores) // 2
        pruner.decide_at(0.7)
        gone.append(torch.cat(list(pruner.masks.values())))
    assert task == "features" or bool((gone[0] != gone[1]).any())


@pytest.mark.parametrize("task", OUTPUTS)
def test_a_refit_brings_outputs_nearer_to_the_dense_ones(task, tmp_path):
    bare, refitted = pruned(task, criterion="remaining"), pruned(task, refit=True)
    x = next(iter(data(task)))[0]
    with torch.no_grad():
        dense = refitted.dense(x)
        far, near = (float((r.model(x) - dense).square().mean()) for r in (bare, refitted))
    assert near < far
    refitted.save(tmp_path / "small")
    again = nvit.load(tmp_path / "small")
    torch.testing.assert_close(again(x), refitted.model(x), rtol=0, atol=1e-5 * float(dense.abs().max()))


def test_features_keep_their_width():
    result = pruned("features", latency_target=0.5)
    assert result.model(torch.zeros(1, 3, 16, 16)).shape == (1, 48)
    assert result.masks["emb"].all() and not result.masks["blocks.0.mlp"].all()
    with pytest.raises(ValueError, match="nothing is left to prune"):
        pruned("features", only=("emb",))


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_a_training_run_lowers_the_loss_of_the_task(task):
    """Twelve images learnt by heart, after three tenths of the latency have left."""
    model, batches = host(task), list(data(task, 12))
    config = nvit.PruneConfig(
        task=task, latency_target=0.7, interval=3, lr=0.5, batch_size=6, distill_weight=1.0, bundle_heads=1, seed=1
    )
    before = nvit.accuracy(model, batches, task=task)["loss"]
    result = nvit.prune(model, batches, config, table(model, config))
    tuned = nvit.finetune(
        result.model.train(),
        batches,
        nvit.FinetuneConfig(task=task, epochs=40, lr=0.3, batch_size=6, distill_weight=0.0),
    )
    assert nvit.accuracy(tuned, batches, task=task)["loss"] < 0.5 * before


def test_a_tower_is_finetuned_towards_the_unpruned_one():
    result = pruned("features", latency_target=0.5)
    batches = list(data("features"))
    before = nvit.accuracy(result.model, batches, reference=result.dense)["cosine"]
    tuned = nvit.finetune(
        result.model.train(),
        [x for x, _ in batches],  # images alone
        nvit.FinetuneConfig(epochs=10, lr=0.05, batch_size=6, distill_weight=1.0),
        teacher=result.dense,
    )
    after = nvit.accuracy(tuned, batches, reference=result.dense)["cosine"]
    assert before < after <= 1


def test_a_tower_is_compared_with_something():
    with pytest.raises(ValueError, match="task features compares a model with the unpruned one"):
        nvit.accuracy(make("no_classifier"), data("features"))
    assert nvit.accuracy(m := make("no_classifier"), data("features"), reference=m)["cosine"] == pytest.approx(1)
    with pytest.raises(ValueError, match="there is no teacher"):
        nvit.finetune(make("no_classifier"), data("features"), nvit.FinetuneConfig(epochs=1))


def test_one_output_is_asked_about():
    model = make("plain", num_classes=1)
    with pytest.raises(ValueError, match="take --task regression"):
        nvit.prune(model, data("regression"), CONFIG)


def test_scores_that_are_all_alike_stop_the_run():
    """As those of a softmax over one class did: its loss is 0 whatever the weights."""
    model, config = make("plain"), dataclasses.replace(CONFIG, criterion="hessian")
    model.head.weight.data.zero_()
    pruner = Pruner(model, table(model, config), config)
    pruner.score(torch.zeros(6, 3, 16, 16), torch.zeros(6, dtype=torch.long))
    masks = {name: m.clone() for name, m in pruner.masks.items()}
    for decide in (pruner.decide, lambda: pruner.decide_at(0.7)):
        with pytest.raises(ValueError, match="scores are 0: criterion hessian tells no unit from another"):
            decide()
    assert all(torch.equal(masks[name], m) for name, m in pruner.masks.items())


def test_labels_of_another_task_stop_a_run_before_anything_leaves():
    model = make("plain", num_classes=4)
    config = dataclasses.replace(CONFIG, criterion="fisher")
    with pytest.raises(ValueError, match="take --task multilabel"):
        nvit.prune(model, data("multilabel"), config, table(model, config))
    assert tasks.of("auto", model).name == "classification"
