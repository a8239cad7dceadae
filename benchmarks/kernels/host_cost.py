"""What a fused op costs the host beside torch's own, on a CPU with Triton's launches replaced by nothing.

    python -m benchmarks.kernels.host_cost >> benchmarks/results/host_cost_cpu.csv

A GPU runs ahead only while the host keeps up, so this is what bounds an eager step of short kernels. One thread, small
tensors, medians of calls in turns. `ours_us` is our Python alone; `bound_us` has Triton's too, which binds and
specialises the arguments of every launch and looks its kernel up, up to where the driver would be called. What torch's
ops compute on a CPU is counted against torch, so the ratios flatter ours by that much. Right first: the same calls are
compared with the definitions in a process of their own, under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nvit_kernels import functional, reference

RUN = JITFunction.run
TURNS, WARM_UP = 2000, 200
TOKENS, WIDTH, HIDDEN, HEADS, DIM = 8, 64, 128, 2, 32
Op = Callable[..., Tensor]


def ops() -> dict[str, tuple[Op, Op, Op, tuple[Tensor, ...]]]:
    """Ours, torch's and the definition by op, with tensors to call them on."""
    torch.manual_seed(0)
    x, w, b = torch.randn(1, TOKENS, WIDTH), torch.randn(WIDTH), torch.randn(WIDTH)
    q, k, v = torch.randn(3, 1, HEADS, TOKENS, DIM)
    w1, b1 = torch.randn(HIDDEN, WIDTH) / WIDTH**0.5, torch.randn(HIDDEN)
    w2, b2 = torch.randn(WIDTH, HIDDEN) / HIDDEN**0.5, torch.randn(WIDTH)
    return {
        "layer norm": (
            functional.kept_layer_norm,
            lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b, 1e-6),
            reference.kept_layer_norm,
            (x, w, b),
        ),
        "attention": (
            lambda q, k, v: functional.attention(q, k, v, DIM**-0.5),
            F.scaled_dot_product_attention,
            lambda q, k, v: reference.attention(q, k, v, DIM**-0.5),
            (q, k, v),
        ),
        "mlp": (
            functional.mlp,
            lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
            reference.mlp,
            (x, w1, b1, w2, b2),
        ),
    }


def forward(op: Op, tensors: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    def run():
        with torch.no_grad():
            return op(*tensors)

    return run


def with_backward(op: Op, tensors: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    along = torch.ones_like(op(*leaves))
    return lambda: torch.autograd.grad(op(*leaves), leaves, along)


def check() -> None:
    """Raise unless ours equals the definition in float64, forward and backward. Runs under the interpreter."""
    for name, (ours, _, definition, tensors) in ops().items():
        doubles = tuple(t.double() for t in tensors)
        for passes in (forward, with_backward):
            results, exact = passes(ours, tensors)(), passes(definition, doubles)()
            for r, e in zip(*((x,) if isinstance(x, Tensor) else x for x in (results, exact)), strict=True):
                error = float((r - e).abs().max() / e.abs().max())
                assert error < 1e-5, f"{name}: wrong by {error:.1e} of the largest value; it will not be timed"


class NoDevice:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextlib.contextmanager
def launches_replaced(by: Callable) -> Iterator[None]:
    """Let CPU tensors take the fused ops' path, where `by` stands for `JITFunction.run`."""
    run, interpreted = JITFunction.run, functional.INTERPRET
    JITFunction.run, functional.INTERPRET = by, True
    try:
        yield
    finally:
        JITFunction.run, functional.INTERPRET = run, interpreted


def nothing(*_, **__) -> None:
    """No launch at all."""


def bound_only(kernel: JITFunction, *arguments, warmup: bool, **options) -> object:
    """A launch up to where the driver would be called, its kernel compiled at the first."""
    return RUN(kernel, *arguments, warmup=True, **options)


def microseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median time of a call of each, taken in turns so that whatever else the machine does meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM_UP + TURNS):
        for name, call in calls.items():
            start = time.perf_counter_ns()
            call()
            if turn >= WARM_UP:
                times[name].append((time.perf_counter_ns() - start) / 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def rows() -> list[dict[str, object]]:
    """A row for each op and passes: µs of ours and of torch, their ratio, and the ratio to reach."""
    made = []
    for name, (ours, theirs, _, tensors) in ops().items():
        for passes, target in ((forward, 3.0), (with_backward, 1.5)):
            took = {}
            for what, run in (("bound", bound_only), ("ours", nothing)):
                with launches_replaced(run):
                    took |= microseconds({what: passes(ours, tensors), "torch": passes(theirs, tensors)})
            made.append({"op": name, "passes": passes.__name__.replace("with_", "forward and "),
                         "ours_us": round(took["ours"], 1), "torch_us": round(took["torch"], 1),
                         "ratio": round(took["ours"] / took["torch"], 2), "target": target,
                         "bound_us": round(took["bound"], 1), "torch": torch.__version__,
                         "triton": triton.__version__})  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare results under the interpreter, and time nothing")
    if parser.parse_args().check:
        check()
        return
    subprocess.run([sys.executable, "-m", __spec__.name, "--check"], check=True,
                   env={**os.environ, "TRITON_INTERPRET": "1"})  # fmt: skip
    torch.set_num_threads(1)
    driver.set_active(NoDevice())
    measured = rows()
    table = csv.DictWriter(sys.stdout, list(measured[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(measured)


if __name__ == "__main__":
    main()
