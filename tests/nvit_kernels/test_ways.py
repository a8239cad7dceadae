"""Which way an MLP goes: offered by architecture, measured once a shape, never one that waits inside a graph."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from nvit_kernels import ways

TIMES = {"whole": 3.0, "gather": 1.0, "fused": 2.0}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of one's choice: gpu(arch, capturing) makes x `(2, 100, 24)` on it and counts what is timed."""
    timed = []

    def device(arch, capturing=False):
        monkeypatch.setattr(ways, "capability", lambda _: arch)
        monkeypatch.setattr(ways, "device_milliseconds", lambda call, *_, **__: call())
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: f"sm_{arch}")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        with FakeTensorMode():
            return torch.empty(2, 100, 24, device="cuda"), timed

    monkeypatch.setattr(ways, "_measured", {})
    return device


def run(timed):
    return lambda way: timed.append(way) or TIMES[way]


@pytest.mark.parametrize(("arch", "listed", "offered", "chosen"), [
    (80, True, ["whole", "gather", "fused"], "gather"), (80, False, ["whole", "fused"], "fused"),
    (90, True, ["whole", "gather"], "gather"), (90, False, [], "whole"), (100, False, [], "whole"),
])  # fmt: skip
def test_the_fastest_of_what_an_architecture_is_offered(gpu, arch, listed, offered, chosen):
    x, timed = gpu(arch)
    assert ways.choose({}, "mlp", x, 40, listed, run(timed)) == chosen and timed == offered
    near = x[:, :80]  # 160 tokens are about as many as 200
    assert ways.choose({}, "mlp", near, 40, listed, run(timed)) == chosen and timed == offered, "measured again"
    if offered:
        (key,) = ways.measured()
        assert key == ("mlp", f"sm_{arch}", "torch.float32", 256, 24, 40, listed)
        assert ways.measured()[key] == {way: TIMES[way] for way in offered}


def test_a_choice_is_remembered_and_a_preference_goes_before_it(gpu):
    x, timed = gpu(80)
    remembered = {}
    assert ways.choose(remembered, "mlp", x, 40, True, run(timed)) == "gather" == remembered["mlp"]
    try:
        ways.prefer("mlp", "fused")
        assert ways.choose(remembered, "mlp", x, 40, True, run(timed)) == "fused"
    finally:
        ways.prefer("mlp", None)
    assert ways.choose(remembered, "mlp", x, 40, True, run(timed)) == "gather" and len(timed) == 3


@pytest.mark.parametrize(("arch", "listed", "chosen"), [(80, True, "fused"), (80, False, "whole"), (90, True, "whole")])
def test_inside_a_graph_nothing_waits_and_nothing_is_timed(gpu, arch, listed, chosen):
    x, timed = gpu(arch, capturing=True)
    remembered = {}
    assert ways.choose(remembered, "mlp", x, 40, listed, run(timed)) == chosen and not remembered
    assert ways.choose({"mlp": "gather"}, "mlp", x, 40, listed, run(timed)) == chosen
    assert not timed and ways.without_waiting("mlp", x, listed) == chosen


def test_on_a_cpu_nothing_is_timed():
    x, timed = torch.empty(2, 100, 24), []
    assert ways.choose({}, "mlp", x, 40, True, run(timed)) == "fused"
    assert ways.choose({}, "mlp", x, 40, False, run(timed)) == "whole" and not timed


def test_a_timed_step_leaves_nothing_behind():
    w = torch.randn(4, 3, requires_grad=True)
    ways.step(lambda x, w, b: x @ w, (torch.randn(2, 4), w, None))
    assert w.grad is None
    with torch.no_grad():
        ways.step(lambda x, w, b: x @ w, (torch.randn(2, 4), w, None))
