"""The pruner in a loop of one's own: its decisions, scores and refusals are those of `nvit.prune`."""

import math

import pytest
import torch
import torch.nn.functional as F

import nvit
from nvit import LatencyTable, PruneConfig, Pruner
from nvit.criteria.gradients import unit_saliency
from nvit.criteria.registry import CRITERIA
from nvit.layers import prunable_layers
from nvit.structure.masks import full_masks
from tests.hosts import images, labels, make
from tests.runs import assert_pruned_weights_are_zero, config, loader, same, table, weights


def test_a_loop_by_hand_prunes_and_never_revives_a_weight():
    settings = config(latency_target=(0.6,), interval=3)
    model = make("plain")
    pruner = Pruner(model, table(model, settings), settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data, ratios = list(loader(settings)), [1.0]
    for step in range(200):
        x, y = data[step % len(data)]
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        met = pruner.step()
        optimizer.zero_grad()
        assert_pruned_weights_are_zero(model, pruner.groups, pruner.masks)
        assert (pruner.ratio < ratios[-1]) == ((step + 1) % 3 == 0), "decisions come when due, and only then"
        ratios.append(pruner.ratio)
        if pruner.done:
            break
    assert met == [0.6] and ratios[-1] <= 0.6 < ratios[-2]
    small, x = pruner.compact(), images(model)
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    # Momentum goes on after pruning: the optimiser's own state must not bring a weight back.
    for x, y in data:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert pruner.step() == []
        optimizer.zero_grad()
        assert_pruned_weights_are_zero(model, pruner.groups, pruner.masks)


def by_hand(batches, settings, targets, rounds=1):
    """One shot written out: the pruner, its scores at every decision."""
    model, decided = make("plain"), []
    pruner = Pruner(model, table(model, settings), settings)
    for target in targets:
        start = pruner.ratio
        for r in range(1, rounds + 1):
            for x, y in batches:
                pruner.score(x, y if CRITERIA[settings.saliency].capabilities.labels else None)
            decided.append(pruner.scores())
            pruner.decide_at(start + (target - start) * r / rounds)
    return pruner, decided


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("criterion", ["auto", *CRITERIA])
def test_one_shot_by_hand_decides_as_prune_does(criterion, rounds):
    """Bit for bit, with every criterion; those with a signal of their own are given no labels."""
    settings = config(train=False, criterion=criterion, rounds=rounds)
    model, batches = make("plain"), list(loader(settings))
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    result = nvit.prune(model, batches, settings, table(model, settings))
    pruner, _ = by_hand(batches, settings, (0.8, 0.5), rounds)
    assert same(pruner.masks, result.masks) and same(weights(pruner.model), weights(model))
    assert pruner.history == result.history and pruner.met == [0.8, 0.5] and pruner.done
    assert {n: p.requires_grad for n, p in pruner.model.named_parameters()} == trainable
    assert all(p.grad is None for p in pruner.model.parameters())
    assert all(not layer._watches for layer in prunable_layers(pruner.model).values())
    assert same(weights(pruner.compact()), weights(result.model))


@pytest.mark.parametrize("criterion", [name for name, c in CRITERIA.items() if c.capabilities.training])
def test_a_backward_pass_of_ones_own_is_observed_without_training(criterion):
    """Cross entropy sent backward by hand says what `score` does, decision after decision."""
    settings = config(train=False, criterion=criterion)
    batches = list(loader(settings))[:2]
    expected, decided = by_hand(batches, settings, (0.8, 0.5))
    model = make("plain")
    pruner = Pruner(model, table(model, settings), settings)
    for target, scores in zip((0.8, 0.5), decided, strict=True):
        for x, y in batches:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            pruner.observe()
        for name, s in pruner.scores().items():
            # From weights or from activations: sums of the same products in another order.
            torch.testing.assert_close(s, scores[name], rtol=1e-4, atol=1e-5 * float(scores[name].max()))
        pruner.decide_at(target)
    assert pruner.done and pruner.met == expected.met


@pytest.mark.parametrize("criterion", ["curvature", "remaining"])
def test_a_loss_of_ones_own_says_nothing_to_a_criterion_with_its_own_signal(criterion):
    model = make("plain")
    pruner = Pruner(model, LatencyTable.analytic(model), PruneConfig(train=False, criterion=criterion))
    F.cross_entropy(model(images(model)), labels(model, 3)).backward()
    for observe in (pruner.observe, pruner.step):
        with pytest.raises(ValueError, match=rf"criterion {criterion} sends a signal of its own.*call score\(images\)"):
            observe()


@pytest.mark.parametrize("criterion", ["fisher", "hessian", "nvit", "curvature"])
def test_a_batch_that_cannot_be_scored_by_hand_leaves_nothing_behind(criterion):
    settings = config(train=False, criterion=criterion)
    model = make("plain")
    pruner = Pruner(model, table(model, settings), settings)
    x, y = images(model, 4), labels(model, 4)
    pruner.score(x, y)
    before = pruner.scores()
    with pytest.raises(FloatingPointError, match=r"is nan on scoring batch 2|not finite on calibration batch 2"):
        pruner.score(torch.full_like(x, math.nan), y)
    assert all(not layer._watches for layer in prunable_layers(model).values())
    assert all(p.requires_grad for p in model.parameters())
    assert same(pruner.scores(), before)
    pruner.score(x, y)  # and it goes on
    pruner.decide_at(0.5)
    assert pruner.done


def test_labels_are_asked_for_by_those_who_read_them():
    for criterion, c in CRITERIA.items():
        for drawn in (False, True):
            settings = config(train=False, criterion=criterion, labels="sampled" if drawn else "true")
            model = make("plain")
            pruner = Pruner(model, table(model, settings), settings)
            if c.capabilities.labels and not drawn:
                with pytest.raises(ValueError, match=f"criterion {criterion} reads labels, and none came"):
                    pruner.score(images(model))
            else:
                pruner.score(images(model))
                assert pruner.scores().keys() == {g.name for g in pruner.free}


def test_saliency_of_a_step_is_the_loss_gradients_own():
    settings = config(momentum=0.0)
    model = make("plain")
    pruner = Pruner(model, table(model, settings), settings)
    F.cross_entropy(model(images(model)), labels(model, 3)).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    pruner.step()
    for g in pruner.groups:
        expected = unit_saliency(g, dict(model.named_parameters()), grads)
        torch.testing.assert_close(pruner.mean.value()[g.name], expected)


def test_an_infinite_gradient_by_hand_is_named_and_changes_no_mask():
    settings = config()
    model = make("plain")
    pruner = Pruner(model, table(model, settings), settings)
    F.cross_entropy(model(images(model)), labels(model, 3)).backward()
    model.blocks[0].mlp.fc2.weight.grad[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"saliency is not finite"):
        pruner.step()
    assert same(pruner.masks, full_masks(pruner.groups))
