"""Kernel or torch's own op: the one that is measured faster, once per shape and device, kept in a file."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nvit.layers import choice, functional
from nvit.layers.choice import Choices
from nvit.layers.projection import Projection


class Clock:
    """A stopwatch that gives the times it is told, kernel first, and counts how often it is asked."""

    def __init__(self, kernel: float = 1.0, plain: float = 2.0) -> None:
        self.times, self.asked = [kernel, plain], 0

    def __call__(self, ways, tensors):
        self.asked += 1
        for way in ways:
            way(*tensors)
        return self.times


def choices(clock, folder) -> Choices:
    return Choices(clock, lambda device: folder / f"{device.type}.json", kind="cpu")


def kernel(x, w):
    return x * w + 1000


def plain(x, w):
    return x * w


X, W = torch.full((3, 4), 2.0), torch.full((4,), 3.0)


@pytest.mark.parametrize(("times", "value"), [((1.0, 2.0), 1006), ((2.0, 1.0), 6), ((1.0, 1.0), 6)])
def test_the_faster_way_runs_and_a_kernel_that_is_no_faster_never_does(times, value, tmp_path):
    clock = Clock(*times)
    with choice.using(choices(clock, tmp_path)):
        for _ in range(3):
            assert float(choice.run("op", kernel, plain, X, W)[0, 0]) == value
    assert clock.asked == 1, "once per shape"


def test_every_op_shape_dtype_and_absence_is_measured_for_itself(tmp_path):
    clock = Clock()
    with choice.using(choices(clock, tmp_path)) as made:
        choice.run("op", kernel, plain, X, W)
        choice.run("another", kernel, plain, X, W)
        choice.run("op", kernel, plain, X[:2], W)
        choice.run("op", kernel, plain, X.double(), W.double())
        choice.run("op", lambda x, w: x, lambda x, w: x, X, None)
        with torch.autocast("cpu", torch.bfloat16):
            choice.run("op", kernel, plain, X, W)
    assert clock.asked == 6
    assert list(made.of(X.device)) == [
        "op float32 3x4 4",
        "another float32 3x4 4",
        "op float32 2x4 4",
        "op float64 3x4 4",
        "op float32 3x4 -",
        "op bfloat16 3x4 4",
    ]


def test_what_was_measured_is_found_again_by_the_next_process(tmp_path):
    with choice.using(choices(Clock(3.0, 1.5), tmp_path)):
        choice.run("op", kernel, plain, X, W)
    assert json.loads((tmp_path / "cpu.json").read_text()) == {"op float32 3x4 4": {"kernel": 3.0, "torch": 1.5}}
    later = Clock()
    with choice.using(choices(later, tmp_path)):
        assert float(choice.run("op", kernel, plain, X, W)[0, 0]) == 6
        choice.run("op", kernel, plain, X[:1], W)
    assert later.asked == 1, "only the new shape"
    assert len(json.loads((tmp_path / "cpu.json").read_text())) == 2


def test_two_processes_keep_what_either_measured(tmp_path):
    one, other = choices(Clock(), tmp_path), choices(Clock(), tmp_path)
    for made in (one, other):
        made.of(X.device)  # both begin with nothing
    for made, x in ((one, X), (other, X[:1])):
        with choice.using(made):
            choice.run("op", kernel, plain, x, W)
    assert len(json.loads((tmp_path / "cpu.json").read_text())) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"op float32 3x4 4": {"kernel": 1}}', '{"op": 3}', "\x00\xff"])
def test_a_damaged_file_is_measured_again(content, tmp_path):
    (tmp_path / "cpu.json").write_bytes(content.encode("latin1"))
    clock = Clock(2.0, 1.0)
    with choice.using(choices(clock, tmp_path)):
        assert float(choice.run("op", kernel, plain, X, W)[0, 0]) == 6
    assert clock.asked == 1
    assert json.loads((tmp_path / "cpu.json").read_text())["op float32 3x4 4"] == {"kernel": 2.0, "torch": 1.0}


def test_a_folder_that_takes_no_files_does_not_stop_anything(tmp_path):
    (tmp_path / "taken").write_text("a file where the folder should be")
    clock = Clock()
    with choice.using(choices(clock, tmp_path / "taken")):
        for _ in range(2):
            assert float(choice.run("op", kernel, plain, X, W)[0, 0]) == 1006
    assert clock.asked == 1


def test_a_kernel_that_cannot_be_timed_does_not_run(tmp_path):
    def refuses(ways, tensors):
        raise RuntimeError("operation not permitted when stream is capturing")

    with choice.using(choices(refuses, tmp_path)):
        assert float(choice.run("op", kernel, plain, X, W)[0, 0]) == 6
    assert not list(tmp_path.iterdir()), "nothing is known about it"


def test_where_gradients_are_wanted_the_kernels_own_rule_decides(tmp_path):
    clock = Clock(2.0, 1.0)
    with choice.using(choices(clock, tmp_path)):
        w = W.clone().requires_grad_()
        assert float(choice.run("op", kernel, plain, X, w)[0, 0].detach()) == 1006 and clock.asked == 0
        with torch.no_grad():
            assert float(choice.run("op", kernel, plain, X, w)[0, 0]) == 6 and clock.asked == 1


def test_nothing_is_measured_on_fake_tensors_or_while_somebody_counts(tmp_path):
    clock = Clock(2.0, 1.0)
    with choice.using(choices(clock, tmp_path)):
        with FakeTensorMode() as fake:
            choice.run("op", kernel, plain, fake.from_tensor(X), fake.from_tensor(W))
        with FlopCounterMode(display=False):
            choice.run("op", kernel, plain, X, W)
        assert clock.asked == 0
        choice.run("op", kernel, plain, X, W)
        assert clock.asked == 1


def test_a_compiled_model_takes_torchs_ops_in_one_graph(tmp_path):
    clock = Clock(1.0, 2.0)
    with choice.using(choices(clock, tmp_path)):
        fast = torch.compile(partial(choice.run, "op", kernel, plain), fullgraph=True, backend="eager")
        assert float(fast(X, W)[0, 0]) == 6 and clock.asked == 0


def test_without_choices_and_on_another_device_kernels_run_as_before(tmp_path):
    with choice.using(None):
        assert float(choice.run("op", kernel, plain, X, W)[0, 0]) == 1006
    clock = Clock(2.0, 1.0)
    elsewhere = Choices(clock, lambda device: tmp_path / "x.json")  # of CUDA
    with choice.using(elsewhere):
        assert float(choice.run("op", kernel, plain, X, W)[0, 0]) == 1006 and clock.asked == 0


def test_what_was_chosen_is_described(tmp_path):
    made = choices(Clock(1.0, 2.0), tmp_path)
    assert made.describe(X.device) == []
    with choice.using(made):
        choice.run("op", kernel, plain, X, W)
        made.stopwatch = Clock(2.0, 1.0)
        choice.run("op", kernel, plain, X[:1], W)
    assert made.describe(X.device) == [
        "op: kernel faster on 1 of 2 shapes, torch / kernel 0.50 to 2.00",
        f"measured in {tmp_path / 'cpu.json'}",
    ]


# --- in the layers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """Kernels that take every shape, compute what torch does and say that they ran."""
    ran = []

    def attention(q, k, v, scale, bias=None, mask=None, mass=None):
        ran.append("attention" if mass is None else "attention with a mass")
        return functional._torch_attention(q, k, v, bias, mask, mass, scale=scale, dropout=0.0)

    def mlp(x, w1, b1, w2, b2):
        ran.append("mlp")
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    def kept_layer_norm(x, w, b, eps):
        ran.append("layer_norm")
        return F.layer_norm(x, x.shape[-1:], w, b, eps)

    every = {f"{name}_takes": lambda *_: True for name in ("attention", "mlp", "kept_layer_norm")}
    every["attention_takes_mass"] = lambda *_: True
    fakes = SimpleNamespace(attention=attention, mlp=mlp, kept_layer_norm=kept_layer_norm, **every)
    monkeypatch.setattr(functional, "_kernels", lambda x: fakes)
    return ran


@pytest.mark.parametrize(("times", "expected"), [((1.0, 2.0), ["layer_norm", "attention", "mlp"]), ((2.0, 1.0), [])])
def test_each_op_of_a_block_runs_the_faster_way_with_equal_results(times, expected, kernels, tmp_path):
    torch.manual_seed(0)
    x, q, bias = torch.randn(2, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(1, 3, 5, 5)
    norm, fc1, fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def block():
        rows = torch.tensor([0, 3, 5, 9])
        masked = Projection(fc1.weight, fc1.bias, rows), Projection(fc2.weight, fc2.bias, None, rows)
        return (
            functional.kept_norm(x, norm.weight, norm.bias, None, 1e-5),
            functional._attend(q, q, q, 0.3, bias, None, 0.0),
            functional.mlp(x, *masked, nn.GELU()),
        )

    clock = Clock(*times)
    with torch.no_grad():
        with functional.kernels(False), choice.using(None):
            exact = block()
        kernels.clear()
        with choice.using(choices(clock, tmp_path)):
            block()
            kernels.clear()
            got = block()
    assert kernels == expected and clock.asked == 3
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_of_merged_tokens_is_measured_for_itself_and_once_whatever_their_sizes(kernels, tmp_path):
    """Beside a bias or a mask, a mass takes torch's way, unmeasured."""
    torch.manual_seed(0)
    q, clock = torch.randn(2, 3, 5, 8), Clock(1.0, 2.0)
    with choice.using(choices(clock, tmp_path)) as made, torch.no_grad():
        functional._attend(q, q, q, 0.3, None, None, 0.0)
        for count in (1.0, 2.0, 7.0):
            functional._attend(q, q, q, 0.3, None, None, 0.0, torch.full((2, 5), count).log())
        assert clock.asked == 2
        assert list(made.of(q.device)) == [
            "attention float32 2x3x5x8 2x3x5x8 2x3x5x8 - -",
            "attention float32 2x3x5x8 2x3x5x8 2x3x5x8 - - 2x5",
        ]
        kernels.clear()
        mass, bias, mask = torch.rand(2, 5), torch.randn(1, 3, 5, 5), torch.eye(5) + torch.rand(2, 1, 5, 5) > 0.3
        for added in ((None, None), (bias, None), (None, mask), (bias, mask)):
            found = functional._attend(q, q, q, 0.3, *added, 0.0, mass)
            logits = q @ q.mT * 0.3 + mass[:, None, None] + (0 if added[0] is None else bias)
            logits = logits if added[1] is None else logits.masked_fill(~mask, -torch.inf)
            torch.testing.assert_close(found, logits.softmax(-1) @ q)
        assert kernels == ["attention with a mass"] and clock.asked == 2
