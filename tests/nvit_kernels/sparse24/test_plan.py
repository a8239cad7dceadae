"""Plans: a replay equals a call, writes where the first one did, and refuses what it was not made for."""

import statistics
import time

import pytest
import torch
from torch import nn

from nvit_kernels import _native, sparse24
from nvit_kernels.sparse24 import CompressPlan, RepackPlan

COMPILED_ONLY = pytest.mark.skipif(not _native.load().cpu, reason=_native.load().why_not_cpu or "compiled")
SHAPES = [(32, 64), (96, 192), (64, 320)]
HOST_US = 150


@pytest.fixture(params=["compiled", "plain"])
def code(request, monkeypatch):
    """With compiled code, and as where there is none."""
    if request.param == "plain":
        monkeypatch.setattr("nvit_kernels.sparse24.plan._native.load", lambda: _native.Native(False, False))
    elif not _native.load().cpu:
        pytest.skip(_native.load().why_not_cpu)
    return request.param


def matrices(dtype=torch.float16, device="cpu"):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g).to(device, dtype) for s in SHAPES]


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize(("dtype", "to"), [(torch.float16, None), (torch.float32, torch.bfloat16)])
def test_a_replay_equals_a_call_on_what_the_matrices_are_now(code, dtype, to):
    dense = matrices(dtype)
    plan = CompressPlan(dense, dtype=to)
    assert (plan.table is not None) == (code == "compiled")
    first = plan.packed
    assert_same(first, sparse24.compress_2to4_many(dense, dtype=to))
    for d in dense:
        d.copy_(d.flip(0, 1))
    again = plan()
    assert_same(again, sparse24.compress_2to4_many(dense, dtype=to))
    assert all(a is b for a, b in zip(first, again, strict=True)), "results lie where they lay"


@pytest.mark.parametrize("packed", [False, True])
def test_masks_are_read_anew(code, packed):
    dense = matrices()
    masks = [sparse24.mask_2to4(d) for d in dense]
    given = [sparse24.pack_bits(m) for m in masks] if packed else masks
    plan = CompressPlan(dense, given)
    for g, d in zip(given, dense, strict=True):
        other = sparse24.mask_2to4(d.flip(0))
        g.copy_(sparse24.pack_bits(other) if packed else other)
    assert_same(plan(), sparse24.compress_2to4_many(dense, given))


def test_values_are_repacked_after_a_step(code):
    weights = [nn.Parameter(d) for d in matrices(torch.float32)]
    metas = [p.meta for p in sparse24.compress_2to4_many(weights, dtype=torch.float16)]
    plan = RepackPlan(weights, metas, dtype=torch.float16)
    with torch.no_grad():
        for w in weights:
            w.add_(torch.ones_like(w))
    theirs = sparse24.repack_2to4_many(weights, metas, dtype=torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(plan(), theirs, strict=True))


def test_a_weight_whose_data_were_replaced_is_refused(code):
    weights = [nn.Parameter(d) for d in matrices()]
    plan = CompressPlan(weights)
    weights[1].data = weights[1].data.clone()
    with pytest.raises(ValueError, match="matrix 1 lies elsewhere than when the plan was made"):
        plan()


def test_moved_metadata_is_refused(code):
    dense = matrices()
    metas = [p.meta for p in sparse24.compress_2to4_many(dense)]
    plan = RepackPlan(dense, metas)
    metas[2].data = metas[2].clone()
    with pytest.raises(ValueError, match="mask or metadata 2 lies elsewhere"):
        plan()


def test_only_a_checked_replay_refuses_nan(code):
    dense = matrices()
    plan = CompressPlan(dense)
    dense[2][0, 0] = float("nan")
    plan()
    with pytest.raises(ValueError, match="compress_2to4: matrix 2 holds NaN"):
        plan(check=True)


def test_what_a_call_refuses_a_plan_refuses(code):
    with pytest.raises(ValueError, match="M a multiple of 32 and K of 64 for float16"):
        CompressPlan([*matrices(), torch.zeros(31, 64).half()])
    with pytest.raises(ValueError, match="at least one matrix"):
        RepackPlan([], [])


@COMPILED_ONLY
def test_a_matrix_that_would_have_to_be_copied_is_refused():
    turned = torch.randn(64, 32).half().T
    assert len(sparse24.compress_2to4_many([turned])) == 1, "a call copies it"
    with pytest.raises(ValueError, match="compress_2to4: matrix 0 lies so that it would have to be copied"):
        CompressPlan([turned])


@COMPILED_ONLY
def test_a_table_of_another_build_is_refused():
    plan = CompressPlan(matrices())
    plan.table = plan.table[:, :-8].contiguous()
    with pytest.raises(ValueError, match="no plan of this build wrote"):
        plan()


@COMPILED_ONLY
def test_what_a_replay_costs_the_host():
    """48 matrices as in 12 blocks, the GPU's host code with its launches left out. Medians, of the quietest of five."""
    dense = [torch.zeros(32, 64, dtype=torch.float16) for _ in range(48)]
    plan = CompressPlan(dense)
    plan._replay = torch.ops.nvit._unlaunched_2to4.default
    assert plan._replay(plan.table, dense[0], False) == 1, "one launch for all"

    def microseconds() -> float:
        begin = time.perf_counter()
        plan()
        return 1e6 * (time.perf_counter() - begin)

    assert min(statistics.median(microseconds() for _ in range(100)) for _ in range(5)) <= HOST_US


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not _native.load().cuda, reason="needs a GPU and the CUDA library")
def test_plans_on_a_gpu():
    dense = matrices(torch.float32)
    there = [nn.Parameter(d.cuda()) for d in dense]
    plan = CompressPlan(there, dtype=torch.float16)
    repack = RepackPlan(there, [p.meta for p in plan.packed], dtype=torch.float16)
    with torch.no_grad():
        for a, b in zip(dense, there, strict=True):
            a.neg_()
            b.neg_()
    assert_same(plan(), sparse24.compress_2to4_many(dense, dtype=torch.float16))
    assert all(torch.equal(v, p.values) for v, p in zip(repack(), plan.packed, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan()
    with torch.no_grad():
        for a, b in zip(dense, there, strict=True):
            a.mul_(0.5)
            b.mul_(0.5)
    graph.replay()
    assert_same(plan.packed, sparse24.compress_2to4_many(dense, dtype=torch.float16))
