"""Ways to run a function: what each returns, when it runs, what a graph reads."""

from functools import partial

import pytest
import torch

from nvit.utils import modes

gpu = pytest.mark.gpu
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_eager_runs_the_function_as_often_as_it_is_asked():
    seen = []
    run = modes.eager(lambda x: seen.append(1) or x + 1, (torch.ones(2),))
    assert not seen
    assert torch.equal(run(), torch.full((2,), 2.0)) and torch.equal(run(), torch.full((2,), 2.0)) and len(seen) == 2


def test_many_compiled_functions_of_one_body_do_not_meet_torchs_limit_on_recompiling():
    """A run has as many snapshots as targets, a table as many pieces as points; torch counts by code object."""

    def body(x):
        return x.sin() * 2

    with torch._dynamo.config.patch(recompile_limit=2):
        for n in range(1, 6):
            function, x = modes.compiled(body, backend="eager"), torch.randn(n, 3)
            for _ in range(2):
                torch.testing.assert_close(function(x), x.sin() * 2)
        one = modes.compiled(body, backend="eager")
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):  # the limit is there
            for n in range(1, 6):
                one(torch.randn(n, 3))


def test_a_break_in_the_graph_is_an_error():
    def reads_back(x):
        return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        modes.compiled(reads_back, backend="eager")(torch.ones(3))


def test_compile_mode_traces_once_and_runs_the_compiled_function(monkeypatch):
    monkeypatch.setattr(modes, "compiled", partial(modes.compiled, backend="eager"))
    frames = torch._dynamo.utils.counters["stats"]
    before, x = frames["unique_graphs"], torch.randn(3)
    run = modes.RUNNERS["compile"](lambda x: x.cos() + 1, (x,), None)
    for _ in range(3):
        torch.testing.assert_close(run(), x.cos() + 1)
    assert frames["unique_graphs"] - before == 1


def test_memory_is_shared_on_a_gpu_alone():
    assert modes.shared_memory(torch.device("cpu")) is None


@gpu
@cuda
def test_a_replay_computes_what_the_function_does_on_what_its_inputs_hold_by_then():
    layer, x = torch.nn.Linear(64, 64, device="cuda"), torch.randn(8, 64, device="cuda")
    with torch.no_grad():
        run = modes.captured(lambda x: layer(x).relu(), (x,))
        for seed in range(3):
            x.copy_(torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)))
            torch.testing.assert_close(run(), layer(x).relu())


@gpu
@cuda
def test_graphs_in_shared_memory_give_it_back_to_the_next():
    device, x = torch.device("cuda:0"), torch.randn(1 << 20, device="cuda")
    memory = modes.shared_memory(device)
    runs = [modes.captured(lambda x: (x * 2).exp(), (x,), memory) for _ in range(2)]
    held = torch.cuda.memory_reserved()
    runs += [modes.captured(lambda x: (x * 2).exp(), (x,), memory) for _ in range(6)]
    assert torch.cuda.memory_reserved() == held, "each graph took memory of its own"
    assert all(run() is None for run in runs), "nobody keeps these results"


@gpu
@cuda
def test_a_graph_captured_under_autocast_casts_its_weights_itself():
    """A cast copy that autocast kept would be gone when autocast ends."""
    layer, x = torch.nn.Linear(256, 256, device="cuda"), torch.randn(8, 256, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        run = modes.captured(layer, (x,))
    with torch.no_grad():
        layer.weight.mul_(2)
        filler = torch.full((1 << 22,), torch.nan, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            expected = layer(x)
    assert filler.isnan().all()
    torch.testing.assert_close(run(), expected)


@gpu
@cuda
def test_what_reads_back_cannot_be_captured_and_later_work_goes_on():
    x = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError):
        modes.captured(lambda x: x * float(x.sum()), (x,))
    torch.cuda.synchronize()
    assert torch.equal(modes.captured(lambda x: x + 1, (x,))(), x + 1)
