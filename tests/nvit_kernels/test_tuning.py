"""Configs are timed once a kind of call; a launch binds by name what follows from shapes."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from nvit_kernels import tuning
from nvit_kernels.configs import CONFIGS
from nvit_kernels.ops.attention.backward_kernels import dkv_kernel
from nvit_kernels.ops.kept_layer_norm.kernels import forward_kernel

FIXED = dict(windows=None, H=3, N=197, QK8=8, V8=8, qk_h8=8, qk_n8=24, v_h8=8, v_n8=24, do_h8=8, do_n8=24,
             PRECISION="ieee", BLOCK_QK=64, BLOCK_V=64)  # fmt: skip
MEMORY = (None,) * 9 + (1.0,) * 6


@pytest.fixture
def gpu(monkeypatch):
    timed = []

    def milliseconds(call, device, **_):
        timed.append(1)
        if len(timed) == 2:
            raise OutOfResources(1, 0, "shared memory")
        return 10.0 - len(timed)  # the last is the fastest

    monkeypatch.setattr(tuning, "capability", lambda _: 90)
    monkeypatch.setattr(tuning, "device_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode():
        return torch.empty(2, 3, 197, 64, dtype=torch.float16, device="cuda"), timed


def prepare(tuned, x, kind=(197,)):
    return tuned.prepare(kind, x, lambda block: (-(-197 // block["BLOCK_N"]), 3, 2), FIXED, MEMORY)


def test_configs_are_timed_once_a_kind(gpu):
    x, timed = gpu
    tuned, configs = tuning.Tuned("attention_dkv", dkv_kernel), CONFIGS["attention_dkv"][64]
    launch = prepare(tuned, x)
    assert len(timed) == len(configs) > 2, "all that fit"
    fastest = configs[-1]
    assert launch.options["num_warps"] == fastest.num_warps and launch.options["num_stages"] == fastest.num_stages
    assert launch.options["grid"] == (-(-197 // fastest.kwargs["BLOCK_N"]), 3, 2)
    assert launch.bound == tuple({**FIXED, **fastest.kwargs}[name] for name in dkv_kernel.arg_names[len(MEMORY) :])
    prepare(tuned, x)
    assert len(timed) == len(configs), "measured again"
    prepare(tuned, x, (50,))
    assert len(timed) == 2 * len(configs)


def test_while_a_graph_is_captured_the_first_config_runs_and_is_not_remembered(gpu, monkeypatch):
    x, timed = gpu
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tuned = tuning.Tuned("attention_dkv", dkv_kernel)
    assert prepare(tuned, x).options["num_stages"] == CONFIGS["attention_dkv"][64][0].num_stages
    assert not timed and not tuned.best


def test_a_launch_wants_its_kernels_memory_first():
    with pytest.raises(AssertionError, match="must be its last"):
        tuning.Launch(forward_kernel, (1,), dict(rows=1, units=1))
    launch = tuning.Launch(forward_kernel, (1,), dict(rows=4, units=3, UNIT=8, BLOCK_M=4, BLOCK_E=32, num_warps=4))
    assert launch.bound == (4, 3, 8, 4, 32) and launch.options["num_warps"] == 4


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (2, 2), (3, 4), (197, 256), (256, 256), (257, 512)])
def test_about(n, expected):
    assert tuning.about(n) == expected
