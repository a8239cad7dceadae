"""The protocol and the registry: every criterion through begin, backward, observe, finish; what it says it can do."""

import pytest
import torch
import torch.nn.functional as F

from nvit import adapters
from nvit.config import PruneConfig
from nvit.criteria.base import Context, Evidence
from nvit.criteria.registry import CRITERIA, automatic, refusal
from nvit.layers import prunable_layers
from tests.hosts import images, labels, masked

CAN = {name: c.capabilities for name, c in CRITERIA.items()}


def assert_untouched(model):
    assert not any(m._watches or m._forward_pre_hooks or m._forward_hooks for m in prunable_layers(model).values())


def run(name, model, groups, masks, batches, scoring=True, **more):
    """A criterion over batches, begun once; weights want gradients where it reads them."""
    criterion = CRITERIA[name]()
    criterion.begin(Context(model, groups, masks, scoring=scoring, **more))
    for x, y in batches:
        add(criterion, model, x, y)
    return criterion


def add(criterion, model, x, y):
    """One batch."""
    if criterion.wants_images:
        model.zero_grad()
        cls, dist = adapters.find(model).logits(model, x)
        criterion.backward(cls if dist is None else (cls + dist) / 2, lambda z: F.cross_entropy(z, y))
    params = dict(model.named_parameters())
    criterion.observe(Evidence(params, {n: p.grad for n, p in params.items() if p.grad is not None}))


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_goes_through_the_protocol(name):
    """It finishes with a score for every unit, zero where one is gone already, and leaves the model as it was."""
    model, groups, masks = masked("deit_distilled", dtype=torch.float64)
    batches = [(images(model, n, seed=n), labels(model, n)) for n in (4, 3)]
    criterion = run(name, model, groups, masks, batches)
    scores = criterion.finish()
    assert criterion.batches == 2 and scores.keys() == {g.name for g in groups}
    for g in groups:
        keep, found = masks[g.name], scores[g.name]
        assert found.shape == (g.size,) and bool(found.isfinite().all()) and bool((found >= 0).all())
        # Random draws say nothing of masks; a Fisher order goes on, by last digits, over what is gone.
        assert name in ("random", "fisher") or not found[~keep].any(), g.name
    criterion.close()
    criterion.close()
    assert_untouched(model)
    again = criterion.finish()
    assert all(torch.equal(again[n], s) for n, s in scores.items()), "what was observed stays"


@pytest.mark.parametrize("name", CRITERIA)
def test_begun_again_it_goes_on_with_what_it_has(name):
    model, groups, masks = masked("plain", dtype=torch.float64)
    batches = [(images(model, 3, seed=s), labels(model, 3)) for s in (1, 2)]
    whole = run(name, model, groups, masks, batches)
    whole.close()
    criterion = run(name, model, groups, masks, batches[:1])
    criterion.close()
    assert_untouched(model)
    criterion.begin(criterion.context)
    add(criterion, model, *batches[1])
    expected, found = whole.finish(), criterion.finish()
    assert all(torch.equal(found[n], s) for n, s in expected.items())


@pytest.mark.parametrize("name", CRITERIA)
def test_nothing_observed_is_refused(name):
    model, groups, masks = masked("plain")
    criterion = CRITERIA[name]()
    criterion.begin(Context(model, groups, masks, scoring=True))
    with pytest.raises(ValueError, match="no batch"):
        criterion.finish()
    criterion.close()


@pytest.mark.parametrize("name", CRITERIA)
def test_capabilities_are_true(name):
    """Of labels, images and weight gradients, it reads what it says it reads, and nothing else."""
    model, groups, masks = masked("plain", dtype=torch.float64)
    x, can = images(model, 4), CAN[name]
    model.requires_grad_(can.weight_gradients)
    batches = (x, labels(model, 4)), (x, (labels(model, 4) + 1) % 7), (images(model, 4, seed=9), labels(model, 4))
    first, *others = (run(name, model, groups, masks, [batch]).finish() for batch in batches)
    same = [all(torch.equal(first[n], s) for n, s in other.items()) for other in others]
    assert same == [not can.labels, not can.images]
    if can.weight_gradients:
        model.requires_grad_(False)
        with pytest.raises((KeyError, RuntimeError)):
            run(name, model, groups, masks, [(x, labels(model, 4))])


def test_statistics_that_are_known_need_no_images():
    model, groups, masks = masked("plain")
    gathered = run("remaining", model, groups, masks, [(images(model, 4), None)])
    known = CRITERIA["remaining"]()
    known.begin(Context(model, groups, masks, scoring=True, statistics=gathered.statistics))
    assert not known.wants_images and gathered.wants_images
    assert all(torch.equal(a, b) for a, b in zip(known.finish().values(), gathered.finish().values(), strict=True))


def test_a_gate_criterion_says_when_nobody_recorded():
    model, groups, masks = masked("plain")
    criterion = CRITERIA["fisher"]()
    criterion.begin(Context(model, groups, masks))
    criterion.close()
    with pytest.raises(ValueError, match=r"criterion fisher reads gates, which nobody recorded; call start_recording"):
        criterion.observe(Evidence(dict(model.named_parameters())))


def test_auto_is_a_criterion_that_works_there():
    for train in (True, False):
        for refit in (False, not train):
            for budget in ("", "8GB"):
                for ranks in (1, 2):
                    if refit and (budget or ranks > 1):
                        continue  # refused as such
                    name = automatic(train=train, refit=refit, budget=bool(budget), ranks=ranks)
                    assert refusal(name, train=train, budget=budget, ranks=ranks) is None


@pytest.mark.parametrize("name", CRITERIA)
def test_a_run_is_refused_by_capability_in_one_line(name):
    can = CAN[name]
    for allowed, how, says in (
        (can.training, {"train": True}, f"criterion {name} is for pruning without training"),
        (can.budget, {"budget": "8GB"}, f"budget 8GB does not bound criterion {name}"),
        (can.ranks, {"ranks": 2}, f"criterion {name} runs in one process"),
    ):
        found = refusal(name, **how)
        assert (found is None) == allowed, how
        assert allowed or (found.startswith(says) and "\n" not in found)


def test_configs_ask_the_registry():
    for name, can in CAN.items():
        one_shot = PruneConfig(train=False, criterion=name)
        one_shot.check()
        assert one_shot.over_ranks(1) is one_shot
        if can.ranks:
            assert one_shot.over_ranks(2) is one_shot
        else:
            with pytest.raises(ValueError, match=f"criterion {name} runs in one process, not in 2"):
                one_shot.over_ranks(2)
    auto = PruneConfig(train=False)
    assert (auto.saliency, auto.over_ranks(2).saliency) == ("curvature", "fisher")
    training = PruneConfig()
    assert training.over_ranks(2) is training, "a run state's recipe does not depend on how many ranks wrote it"
    for more in ({"refit": True}, {"budget": "8GB"}):
        with pytest.raises(ValueError, match="one process"):
            PruneConfig(train=False, **more).over_ranks(2)


def test_the_registry_knows_each_by_its_own_name():
    assert {name: c.name for name, c in CRITERIA.items()} == {name: name for name in CRITERIA}
