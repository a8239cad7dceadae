"""Attention over short rows on a GPU: right first, then its device time beside torch's backends and today's kernels.

python -m benchmarks.kernels.attention_short rows.csv [--jobs 12]

Everything is compiled and checked in parallel processes first, whose compilations the timing finds in Triton's cache.
Times are of CUDA graphs that go through several sets of tensors, more than the L2 cache holds, so every call finds it
cold. A case whose check fails is not timed, and the exit code says so.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the exact results are then repeatable too

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nvit_kernels import functional, reference
from nvit_kernels.ops.attention import short as op
from nvit_kernels.ops.attention.short import attention_short, attention_short_packed
from nvit_kernels.ops.attention.short_layouts import Config

SCALE, NO_SCORES = 0.125, (None, None, None)
Shape = tuple[int, int, int, int, int]  # batch, heads, tokens, qk, v
TIMED: dict[str, Shape] = {
    "197 64/64 b64": (64, 12, 197, 64, 64),
    "197 24/56 b64": (64, 12, 197, 24, 56),
    "197 64/64 b256": (256, 12, 197, 64, 64),
    "windows 49 32/32": (2048, 4, 49, 32, 32),
}
CHECKED: list[Shape] = [
    (3, 2, tokens, qk, v)
    for tokens, qk, v in (
        (1, 64, 64), (16, 8, 8), (49, 32, 32), (50, 40, 56), (64, 64, 64), (65, 48, 48), (128, 64, 64), (129, 24, 56),
        (160, 64, 64), (196, 64, 64), (197, 64, 64), (197, 24, 56), (208, 32, 32),
    )
]  # fmt: skip
FORWARDS = {
    "197": [Config(64, 4, 1), Config(64, 4, 2), Config(64, 4, 3), Config(128, 8, 1), Config(128, 8, 2)],
    "win": [Config(64, 4, 1), Config(64, 2, 1), Config(32, 2, 1)],
}
BACKWARDS = {
    "197": [Config(32, 8, stages, first) for stages in (1, 2) for first in (False, True)],
    "win": [Config(32, 4, 1), Config(32, 4, 2), Config(64, 4, 1), Config(64, 4, 1, True)],
}
PEERS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Row:
    """One timed provider of one case; times of a call in microseconds of device time."""

    case: str
    provider: str
    median_us: float | None
    p20_us: float | None
    p80_us: float | None
    note: str
    device: str
    torch: str
    triton: str


# --- right first ------------------------------------------------------------------------------------------------------


def inputs(shape: Shape, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """q, k, v, ∂o `(batch, heads, tokens, ·)` laid out token by token."""
    b, h, n, d, e = shape
    made = torch.Generator("cuda").manual_seed(seed)
    return tuple(torch.randn(b, n, h, dim, device="cuda", generator=made).to(dtype).transpose(1, 2)
                 for dim in (d, d, e, e))  # fmt: skip


def everything(call: Callable, tensors: tuple[Tensor, ...], do: Tensor) -> list[Tensor]:
    """Output, three gradients, then head, qk and v scores per sample."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    (b, h, _, d), e = leaves[0].shape, leaves[2].shape[-1]
    kind = torch.float64 if do.dtype == torch.float64 else torch.float32
    scores = [torch.zeros(b, units, device="cuda", dtype=kind) for units in (h, d, e)]
    out = call(*leaves, SCALE, *scores)
    return [out.detach(), *torch.autograd.grad(out, leaves, do), *scores]


def eager(q, k, v, scale, head_scores, qk_scores, v_scores):
    return reference.attention(q, k, v, scale, None, None, None, head_scores, qk_scores, v_scores)


def with_layouts(forward: Config | None, backward: Config | None) -> Callable:
    """`attention_short` with layouts other than its own."""

    def call(q, k, v, scale, *scores):
        class Chosen(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q, k, v):
                o, lse = op.launch(*op.read(q, k, v), scale, forward)
                ctx.save_for_backward(q, k, v, o, lse)
                return o

            @staticmethod
            def backward(ctx, do):
                q, k, v, o, lse = ctx.saved_tensors
                grads = op.separate_gradients(q, v)
                plan, *operands = op.read(q, k, v)
                op.launch_backward(plan, do, *operands, o, lse, scale, grads, scores, backward)
                return grads

        return Chosen.apply(q, k, v)

    return call


def wrong(call: Callable, shape: Shape, dtype: torch.dtype, seeds: int = 3) -> str:
    """What is wrong with a provider at a shape, or nothing: accuracy against float64, and the same bits twice.

    The error may be twice eager's in the same dtype, plus a few roundings of the largest value where eager hits.
    """
    names = ("o", "dq", "dk", "dv", "head scores", "qk scores", "v scores")
    for seed in range(seeds):
        *tensors, do = inputs(shape, dtype, seed)
        ours, again = everything(call, tensors, do), everything(call, tensors, do)
        theirs = everything(eager, tensors, do)
        exact = everything(eager, tuple(t.double() for t in tensors), do.double())
        for name, mine, twice, other, right in zip(names, ours, again, theirs, exact, strict=True):
            if not torch.equal(mine, twice):
                return f"{name}: two runs differ"
            error, allowed = ((t.double() - right).abs().max().item() for t in (mine, other))
            allowed = 2 * allowed + 4 * torch.finfo(dtype).eps * max(1.0, right.abs().max().item())
            if not error <= allowed:
                return f"{name}: error {error:.2e}, {allowed:.2e} allowed"
    return ""


def writes_outside(shape: Shape, dtype: torch.dtype) -> str:
    """Whether the backward writes beside a packed gradient, which here lies inside a larger tensor."""
    b, h, n, d, _ = shape
    q, k, v, do = inputs(shape, dtype, 9)
    around = torch.full((b + 2, n, 3, h, d), 7.0, device="cuda", dtype=dtype)
    plan, *_ = op.read(q, k, v)
    o, lse = op.launch(plan, q, k, v, SCALE)
    op.launch_backward(plan, do, q, k, v, o, lse, SCALE, op.unpack(around[1:-1]), NO_SCORES)
    inside, outside = around[1:-1], torch.cat((around[:1], around[-1:]))
    packed = torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2).requires_grad_()
    (expected,) = torch.autograd.grad(attention_short_packed(packed, SCALE), packed, do)
    return "" if (outside == 7).all() and torch.equal(inside, expected) else "a packed gradient is written wrong"


def jobs() -> list[tuple]:
    """What is compiled and checked, each in any process: the shapes, then every layout that is timed."""
    both = (torch.bfloat16, torch.float16)
    listed = [("ours", shape, dtype, None, None) for shape in CHECKED for dtype in both]
    listed += [("packed", (3, 2, 197, 64, 64), dtype, None, None) for dtype in both]
    for name, shape in TIMED.items():
        if "b256" in name:
            continue
        small = (4, *shape[1:])
        listed += [
            ("layout", small, torch.bfloat16, config, None) for config in FORWARDS[name[:3].replace("win", "win")]
        ]
        listed += [
            ("layout", small, torch.bfloat16, None, config) for config in BACKWARDS[name[:3].replace("win", "win")]
        ]
        listed.append(("today", small, torch.bfloat16, None, None))
    return listed


def check(job: tuple) -> str:
    """Compile and check one job; what is wrong with it, or nothing."""
    kind, shape, dtype, forward, backward = job
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory is NaN
    try:
        if kind == "packed":
            return writes_outside(shape, dtype)
        if kind == "today":
            everything(lambda q, k, v, s, *scores: functional.attention(q, k, v, s), inputs(shape, dtype, 0)[:3],
                       inputs(shape, dtype, 0)[3])  # fmt: skip
            return ""
        return wrong(attention_short if kind == "ours" else with_layouts(forward, backward), shape, dtype)
    except Exception as failed:
        return f"{type(failed).__name__}: {str(failed).strip().splitlines()[0][:200]}"


# --- then fast --------------------------------------------------------------------------------------------------------


def device_us(calls: list[Callable], least: int = 9, replays: int = 15) -> tuple[float, float, float]:
    """(median, 20th, 80th percentile) device time of one call in µs, over replays of a graph of several."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph, rounds = torch.cuda.CUDAGraph(), -(-least // len(calls))
    with torch.cuda.graph(graph):
        for call in calls * rounds:
            call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    graph.replay()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [1e3 * a.elapsed_time(b) / (rounds * len(calls)) for a, b in itertools.pairwise(marks)]
    deciles = statistics.quantiles(times, n=10)
    return statistics.median(times), deciles[1], deciles[7]


def no_grad(call: Callable, *tensors: Tensor) -> Callable:
    def run():
        with torch.no_grad():
            return call(*tensors)

    return run


def step(call: Callable, leaves: list[Tensor], do: Tensor) -> Callable:
    leaves = [t.detach().requires_grad_() for t in leaves]
    return lambda: torch.autograd.grad(call(*leaves), leaves, do)


def sdpa(backend: SDPBackend) -> Callable:
    def call(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, scale=SCALE)

    return call


def ours(q, k, v):
    return attention_short(q, k, v, SCALE)


def today(q, k, v):
    return functional.attention(q, k, v, SCALE)


def scored(q, k, v):
    units = (q.shape[1], q.shape[-1], v.shape[-1])
    buffers = torch.zeros(sum(units), device="cuda").split(units)
    return attention_short(q, k, v, SCALE, *buffers)


def timings(name: str, shape: Shape) -> Iterator[tuple[str, str, Callable[[], list[Callable]]]]:
    """(case, provider, calls, one a set of tensors) of one shape."""
    sets = [inputs(shape, torch.bfloat16, seed) for seed in range(2 if "b256" in name else 3)]
    layouts = name[:3].replace("win", "win")
    for provider, call in (("ours", ours), ("today", today), *((p, sdpa(b)) for p, b in PEERS.items())):
        given = sets
        if "sdpa" in provider and shape[3] != shape[4]:
            wide, provider = max(shape[3:]), f"{provider}, padded beforehand"
            given = [tuple(F.pad(t, (0, wide - t.shape[-1])) for t in s) for s in sets]
        yield f"forward {name}", provider, lambda c=call, g=given: [no_grad(c, *s[:3]) for s in g]
        yield f"forward+backward {name}", provider, lambda c=call, g=given: [step(c, s[:3], s[3]) for s in g]
    yield f"forward+backward {name}", "ours with scores", lambda: [step(scored, s[:3], s[3]) for s in sets]
    if shape[3] == shape[4]:
        packed = [torch.stack([t.transpose(1, 2) for t in s[:3]], 2) for s in sets]
        for provider, call in (("ours", lambda x: attention_short_packed(x, SCALE)),
                               *((p, lambda x, b=b: sdpa(b)(*op.unpack(x))) for p, b in PEERS.items())):  # fmt: skip
            yield (f"forward+backward packed {name}", provider,
                   lambda c=call: [step(c, [x], s[3]) for x, s in zip(packed, sets, strict=True)])  # fmt: skip
    if "b256" in name:
        return
    plan = op.read(*sets[0][:3])[0]
    for config in FORWARDS[layouts]:
        yield f"forward layouts {name}", said(config), lambda c=config: [
            no_grad(op.launch, plan, *s[:3], SCALE, c) for s in sets]  # fmt: skip
    saved, (_, h, _, d, e) = [op.launch(plan, *s[:3], SCALE) for s in sets], shape
    grads = op.separate_gradients(sets[0][0], sets[0][2])
    buffers = tuple(torch.zeros(units, device="cuda") for units in (h, d, e))
    for config in BACKWARDS[layouts]:
        for scores, kind in ((NO_SCORES, ""), (buffers, " scores")):
            yield f"backward layouts {name}", said(config) + kind, lambda c=config, w=scores: [
                no_grad(op.launch_backward, plan, s[3], *s[:3], *kept, SCALE, grads, w, c)
                for s, kept in zip(sets, saved, strict=True)]  # fmt: skip


def said(config: Config) -> str:
    """A layout in words."""
    return f"rows {config.rows} warps {config.warps} stages {config.stages}" + " delta first" * config.delta_first


def timed(case: str, provider: str, calls: Callable[[], list[Callable]]) -> Row:
    """Time one provider; one that fails is noted."""
    versions = (torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    try:
        return Row(case, provider, *(round(t, 2) for t in device_us(calls())), "", *versions)
    except Exception as failed:
        torch.cuda.synchronize()
        return Row(case, provider, None, None, None, f"skipped: {str(failed).strip().splitlines()[0][:120]}", *versions)


def main() -> int:
    """Check everything, time what is right, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, help="where the rows go")
    parser.add_argument(
        "--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile and check"
    )
    chosen, start = parser.parse_args(), time.perf_counter()
    with ProcessPoolExecutor(chosen.jobs, mp_context=get_context("spawn")) as pool:
        verdicts = list(zip(jobs(), pool.map(check, jobs()), strict=True))
    failures = [(job, verdict) for job, verdict in verdicts if verdict]
    for (kind, shape, dtype, forward, backward), verdict in failures:
        print(f"WRONG {kind} {shape} {str(dtype)[6:]} {forward or backward or ''}: {verdict}")
    print(f"{len(verdicts) - len(failures)} of {len(verdicts)} checks passed, {time.perf_counter() - start:.0f} s")
    if any(job[0] in ("ours", "packed") for job, _ in failures):
        return 1
    bad, rows = {said(job[3] or job[4]) for job, _ in failures if job[0] == "layout"}, []
    chosen.csv.parent.mkdir(parents=True, exist_ok=True)
    with chosen.csv.open("w", newline="") as file:
        table = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        table.writeheader()
        for name, shape in TIMED.items():
            for case, provider, calls in timings(name, shape):
                if provider.removesuffix(" scores") in bad:
                    continue
                rows.append(timed(case, provider, calls))
                table.writerow(asdict(rows[-1]))
                file.flush()
                last = rows[-1]
                shown = f"{last.median_us:9.1f}" if last.median_us else f"  {last.note}"
                print(f"{case:38} {provider:44} {shown}", flush=True)
            torch.cuda.empty_cache()
    print(f"{len(rows)} rows, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
