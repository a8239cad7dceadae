"""A training step reads nothing back, blocks what follows a bad one, and is the plain loop that it stands for."""

import copy

import pytest
import torch
from torch import nn

import nvit
from nvit import adapters, parallel, tasks
from nvit.config import PruneConfig
from nvit.criteria import base
from nvit.prune.pruner import Pruner
from nvit.training.distill import Objective, frozen
from nvit.training.optimizer import decay_groups, fused_adamw
from nvit.training.step import Step
from nvit.utils import devices
from tests import fake_device
from tests.fake_device import FAKE, FakeDevice
from tests.hosts import images, labels, make, prepared
from tests.runs import arguments, config, table, weights


def stepper(model, *, teacher=False, clip=0.0, observe=None, constrain=None, lr=1e-3):
    model = adapters.find(model).prepare(model)
    objective = Objective(tasks.of("auto", model), frozen(copy.deepcopy(model)) if teacher else None)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.05), lr=lr)
    assert fused_adamw(optimizer)
    call = parallel.Call(model, adapters.find(model).logits)
    return Step(call, objective, optimizer, clip=clip, observe=observe, constrain=constrain)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_step_is_the_plain_loop(clip):
    model, twin = make("plain", torch.float64), make("plain", torch.float64)
    twin.load_state_dict(model.state_dict())
    seen = []
    step = stepper(model, clip=clip, observe=lambda grads: seen.append({n: g.clone() for n, g in grads.items()}))
    plain = torch.optim.AdamW(decay_groups(adapters.find(twin).prepare(twin), 0.05), lr=1e-3)
    for turn in range(3):
        x, y = images(model, 4, seed=turn), labels(model, 4, seed=turn)
        plain.zero_grad()
        loss = nn.functional.cross_entropy(twin(x), y)
        loss.backward()
        unclipped = {n: p.grad.clone() for n, p in twin.named_parameters() if p.grad is not None}
        if clip:
            nn.utils.clip_grad_norm_(twin.parameters(), clip)
        plain.step()
        step(x, y)
        assert step.look() == pytest.approx(loss.item(), rel=1e-5)
        assert seen[-1].keys() == unclipped.keys()
        for name, g in unclipped.items():
            torch.testing.assert_close(seen[-1][name], g, rtol=1e-5, atol=1e-7)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_after_a_bad_step_nothing_moves(what, monkeypatch):
    monkeypatch.setattr(devices, "reading_is_free", lambda device: False)
    model = make("plain")
    step = stepper(model)
    good, y = images(model, 4), labels(model, 4)
    step(good, y)
    before, state = weights(model), copy.deepcopy(step.optimizer.state_dict()["state"])
    if what == "loss":
        step(torch.full_like(good, float("nan")), y)
    else:
        hook = model.head.weight.register_hook(lambda g: g * float("inf"))
        step(good, y)
        hook.remove()
    for _ in range(2):
        step(good, y)
    with pytest.raises(FloatingPointError, match=r"at step 1; the last good state is kept"):
        step.look()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    for held, now in zip(state.values(), step.optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(held[k], now[k]) for k in held)


@pytest.mark.parametrize("criterion", ["hessian", "nvit", "abs", "taylor"])
def test_nothing_is_read_back_between_decisions(criterion, monkeypatch):
    """Dense, then masked in every kind of width: forward, teacher, backward, scores, clipping, update, projection."""
    fake_device.known_to_torch(monkeypatch)
    settings = config(latency_target=(0.3,), criterion=criterion, interval=2, bundles_per_step=9)
    host = make("plain")
    x, y = images(host, 4), labels(host, 4)
    with FakeDevice() as there:
        model, x, y = host.to(FAKE), x.to(FAKE), y.to(FAKE)
        pruner = Pruner(model, table(model, settings), settings)
        step = stepper(model, teacher=True, clip=1.0, observe=pruner.observe, constrain=lambda: pruner.project())
        for _ in range(3 * settings.interval):
            with there.quiet():
                step(x, y)
            if pruner.deciding:
                step.look()
            pruner.advance()
    assert len(pruner.history) == 3 and min(int(m.sum()) / len(m) for m in pruner.masks.values()) < 1


def test_scores_do_not_depend_on_clipping():
    """Units leave by what the loss says, not by how far a step may go."""
    found = []
    for clip in (0.0, 0.01):
        model, loader, settings, its_table = arguments(
            latency_target=(0.7,), grad_clip=clip, lr=0.0, interval=3, distill_weight=0.0
        )
        found.append(nvit.prune(model, loader, settings, its_table).masks)
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_momentum_runs_over_decisions_and_the_interval_is_averaged():
    """The published runs: every decision rests on all batches since the last one; 0.9 per decision."""
    mean = base.RunningMean(0.9)
    for scores in ((1.0, 3.0), (5.0,), (2.0, 4.0)):
        for s in scores:
            mean.update({"a": torch.tensor([s])})
        value = float(mean.value()["a"])
        mean.decided()
    expected = (0.1 * 0.81 * 2 + 0.1 * 0.9 * 5 + 0.1 * 3) / (1 - 0.9**3)
    assert value == pytest.approx(expected)


def test_tokens_norms_and_biases_do_not_decay():
    model, _ = prepared("deit_distilled")
    free, decayed = (set(map(id, g["params"])) for g in decay_groups(model, 0.05))
    kept = {n for n, p in model.named_parameters() if id(p) in free}
    assert {"cls_token", "dist_token", "pos_embed"} <= kept
    assert all(p.ndim == 1 or n in kept for n, p in model.named_parameters() if id(p) in free)
    assert {n for n, p in model.named_parameters() if id(p) in decayed} >= {"head.weight", "blocks.0.mlp.fc1.weight"}


def test_other_optimisers_are_left_to_the_host():
    assert not fused_adamw(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    assert PruneConfig().graphs


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_a_replayed_run_equals_the_plain_one(amp):
    """Masks, weights and history, bit for bit, through several decisions."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = {}
        for graphs in (True, False):
            model, loader, settings, its_table = arguments(
                latency_target=(0.6,), interval=6, amp=amp, graphs=graphs, distill_weight=1.0, grad_clip=1.0
            )
            result = nvit.prune(model.cuda(), loader, settings, its_table)
            found[graphs] = (result.masks, weights(result.model), result.history)
    finally:
        torch.use_deterministic_algorithms(False)
    (masks, tensors, history), (masks2, tensors2, history2) = found[True], found[False]
    assert history == history2 and len(history) > 2
    assert all(torch.equal(masks[n], masks2[n]) for n in masks)
    assert all(torch.equal(tensors[n], tensors2[n]) for n in tensors)


@pytest.mark.gpu
def test_a_bad_step_in_a_graph_stops_the_run_with_its_number():
    model = make("plain").cuda()
    from nvit.training.step import GraphedStep

    step = GraphedStep(stepper(model))
    x, y = images(make("plain"), 4).cuda(), labels(make("plain"), 4).cuda()
    for _ in range(6):
        step(x, y)
    before = weights(model)
    step(torch.full_like(x, float("nan")), y)
    step(x, y)
    with pytest.raises(FloatingPointError, match="at step 6"):
        step.step.look()
    assert step.graph is not None and all(torch.equal(before[n], p) for n, p in model.named_parameters())
