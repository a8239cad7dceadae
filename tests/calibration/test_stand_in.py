"""Modules that stand in for others are called in their place, and leave nothing behind."""

import pytest
import torch
from torch import nn

from nvit.adapters import find
from nvit.calibration.replay import Replay
from nvit.calibration.stand_in import standing_in
from nvit.prune.plan import Plan
from tests.families import HOSTS, ONE_OF_EACH
from tests.hosts import images, prepared


class Doubled(nn.Module):
    """Twice what a module gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x):
        return 2 * self.module(x)


class Broken(nn.Module):
    def forward(self, *_, **__):
        raise KeyError("of a block")


def state(model: nn.Module) -> tuple:
    """What must be the same afterwards: names and identities, order included, and what hangs on the modules."""
    modules = [(n, id(m), sorted(vars(m))) for n, m in model.named_modules(remove_duplicate=False)]
    return list(model.state_dict()), modules, [len(m._forward_pre_hooks) for m in model.modules()]


def shared() -> nn.Sequential:
    """A module at two places, at different depths."""
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer))


def test_a_stand_in_is_called_at_every_place_and_may_call_the_module():
    model, x = shared(), torch.randn(2, 3)
    before, layer = state(model), model[0]
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = 2 * layer(2 * layer(x).relu())
    calls.clear()
    with standing_in(model, {layer: Doubled(layer)}):
        torch.testing.assert_close(model(x), 2 * layer((2 * layer(x)).relu()))
    assert len(calls) == 4, "its own hooks run"
    torch.testing.assert_close(expected, 2 * layer(2 * layer(x).relu()))
    assert state(model)[:2] == before[:2]


def test_every_module_is_back_after_an_exception():
    model, _ = prepared("three_blocks")
    before = state(model)
    with pytest.raises(KeyError, match="of a block"), standing_in(model, {model.blocks[1]: Broken()}):
        model(images(model))
    assert state(model) == before


def test_a_module_that_is_not_there_is_a_mistake_of_ours():
    model = shared()
    before = state(model)
    for stranger in (nn.ReLU(), model):
        with pytest.raises(AssertionError, match="not part of the model"), standing_in(model, {stranger: Broken()}):
            pass
    assert state(model) == before


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("fails", [False, True])
def test_a_replay_and_checkpointing_leave_the_model_as_it_was(name, fails):
    host = HOSTS[name]()
    model = find(host).prepare(host)
    adapter = find(model)
    x = torch.randn(2, *adapter.preprocess(model)["input_size"], generator=torch.Generator().manual_seed(0))
    blocks, before, replay = adapter.blocks(model), state(model), Replay(model)
    with torch.no_grad():
        replay.enter(x)
        for _ in blocks:
            replay.advance()
        whole = adapter.logits(model, x)
    for t, exact in zip(replay.inputs[0][0], whole, strict=True):
        assert (t is None) == (exact is None)
        if t is not None:
            torch.testing.assert_close(t, exact, rtol=0, atol=0)
    assert state(model) == before
    if fails:
        handle = blocks[-1].register_forward_hook(lambda *_: Broken()())
        with pytest.raises(KeyError, match="of a block"), Plan(checkpoint=True).running(model):
            adapter.logits(model, x)
        handle.remove()
    else:
        with Plan(checkpoint=True).running(model):
            again = adapter.logits(model, x)
        torch.testing.assert_close(again.mean, adapter.logits(model, x).mean, rtol=0, atol=0)
        again.mean.sum().backward()
    assert state(model) == before and adapter.blocks(model) == blocks


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_checkpointed_block_keeps_its_hooks_and_runs_again_in_the_backward_pass(name):
    host = HOSTS[name]()
    model = find(host).prepare(host)
    adapter = find(model)
    x = torch.randn(2, *adapter.preprocess(model)["input_size"], generator=torch.Generator().manual_seed(0))
    adapter.logits(model, x).mean.square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    calls = []
    handles = [
        b.register_forward_pre_hook(lambda *_, i=i: calls.append(i)) for i, b in enumerate(adapter.blocks(model))
    ]
    with Plan(checkpoint=True).running(model):
        logits = adapter.logits(model, x).mean
    depth = len(handles)
    assert calls == list(range(depth))
    logits.square().sum().backward()
    assert calls == [*range(depth), *reversed(range(depth))]
    for handle in handles:
        handle.remove()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for n, g in found.items():
        torch.testing.assert_close(g, expected[n], rtol=0, atol=0, msg=n)
