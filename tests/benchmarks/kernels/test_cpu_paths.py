"""Timings of the CPU paths: what pruning saves where no GPU is. `--benchmark-disable` runs each once, as a test."""

import pytest
import torch

from nvit_kernels import Kept, functional
from nvit_kernels.ops.group_dot.plan import DotSlice, GroupDotPlan

pytest.importorskip("pytest_benchmark")
KEPT = [1.0, 0.5]


def fraction(width, kept):
    return None if kept == 1.0 else Kept.from_mask(torch.arange(width) < kept * width)


@pytest.fixture(autouse=True)
def few_rounds(benchmark):
    torch.manual_seed(0)
    benchmark.group = "cpu"
    return benchmark


def timed(benchmark, call):
    with torch.no_grad():
        return benchmark.pedantic(call, rounds=5, iterations=1, warmup_rounds=1)


@pytest.mark.parametrize("kept", KEPT)
def test_attention(benchmark, kept):
    q, k, v = torch.randn(3, 2, 6, 197, 64)
    out = timed(benchmark, lambda: functional.attention(q, k, v, 0.125, heads=fraction(6, kept)))
    assert out.shape == q.shape


@pytest.mark.parametrize("kept", KEPT)
def test_mlp(benchmark, kept):
    x, w1, w2 = torch.randn(2, 197, 192), torch.randn(768, 192), torch.randn(192, 768)
    out = timed(benchmark, lambda: functional.mlp(x, w1, None, w2, None, fraction(768, kept)))
    assert out.shape == x.shape


@pytest.mark.parametrize("kept", KEPT)
def test_kept_layer_norm(benchmark, kept):
    x, w, b = torch.randn(2, 197, 192), torch.ones(192), torch.zeros(192)
    out = timed(benchmark, lambda: functional.kept_layer_norm(x, w, b, fraction(192, kept)))
    assert out.shape == x.shape


def test_group_dot(benchmark):
    w, g = ({"fc1": torch.randn(768, 192)} for _ in range(2))
    plan = GroupDotPlan(
        [DotSlice("fc1", 0, None, (768, 192), axis, 768 * axis) for axis in (0, 1)], {"fc1": (768, 192)}
    )
    assert timed(benchmark, lambda: functional.group_dot(w, g, plan)).shape == (960,)
