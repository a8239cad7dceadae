"""Timing with a gate: a provider's result is compared first, and a wrong one is never timed.

A row is a case and a provider: median, 20th and 80th percentile in ms, device, versions, commit, and a note (why a
peer was skipped, or images/s and memory). Ceilings are measured in the same run. Cold L2 on a GPU.
"""

from __future__ import annotations

import csv
import itertools
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import triton
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
OURS = "nvit"


class SkipProvider(Exception):
    """This provider cannot run this case; the message says why."""


@dataclass(frozen=True)
class Case:
    """One comparison: calls by provider name, the exact result, and how far from it a result may be.

    Attributes:
        error: largest difference allowed, relative to the largest value of `exact`.
        bytes: least memory traffic, and `flops` the work, for the share of each ceiling; 0 where it has no meaning.
    """

    name: str
    providers: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]]
    exact: Callable[[], Tensor | tuple[Tensor, ...]]
    error: float = 2e-2
    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Row:
    case: str
    provider: str
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    device: str
    torch: str = field(default_factory=lambda: torch.__version__)
    triton: str = triton.__version__
    commit: str = field(default_factory=lambda: COMMIT)
    note: str = ""


def commit() -> str:
    """The checked-out commit, with a plus sign when tracked files differ from it."""
    said = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, text=True,
                          cwd=Path(__file__).parent)  # fmt: skip
    return said.stdout.strip() or "unknown"


COMMIT = commit()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """The GPU's name, or the CPU's with its threads."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else ""  # fmt: skip
    return f"CPU {cpu or platform.machine()}, {torch.get_num_threads()} threads"


def milliseconds(calls: dict[str, Callable[[], object]], budget_s: float = 0.4) -> dict[str, tuple[float, ...]]:
    """(median, 20th, 80th percentile) of single calls of each, after warming up.

    On a GPU one after another with the L2 cache flushed between calls; on a CPU in turns, so that whatever else the
    machine does meets them all alike.
    """
    if device().type == "cuda":
        return {name: tuple(triton.testing.do_bench(call, quantiles=[0.5, 0.2, 0.8])) for name, call in calls.items()}
    for call in calls.values():
        call()
    times, end = {name: [] for name in calls}, time.perf_counter() + budget_s * len(calls)
    for turn in range(200):
        if turn >= 7 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: tuple(sorted(t)[len(t) * tenths // 10] for tenths in (5, 2, 8)) for name, t in times.items()}


def relative_error(result: Tensor | tuple[Tensor, ...], exact: Tensor | tuple[Tensor, ...]) -> float:
    """Largest difference over the largest value, worst of the tensors returned; NaN counts as infinite."""
    results, exacts = ((x,) if isinstance(x, Tensor) else x for x in (result, exact))
    worst = 0.0
    for r, e in zip(results, exacts, strict=True):
        error = ((r.double() - e.double()).abs().max() / e.double().abs().max().clamp_min(1e-30)).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def measure(case: Case) -> list[Row]:
    """Rows of a case. A peer that is wrong or unsupported is noted; our own wrong result stops the run.

    Raises:
        AssertionError: our kernel's result is further from the exact one than the case allows.
    """
    exact, rows, name, right = case.exact(), [], device_name(), {}
    for provider, call in case.providers.items():
        try:
            error = relative_error(call(), exact)
        except SkipProvider as reason:
            rows.append(Row(case.name, provider, None, None, None, name, note=f"skipped: {reason}"))
            continue
        except (RuntimeError, NotImplementedError, torch.cuda.OutOfMemoryError) as failed:
            if provider.startswith(OURS):
                raise
            rows.append(Row(case.name, provider, None, None, None, name,
                            note=f"skipped: {str(failed).strip().splitlines()[0][:160]}"))  # fmt: skip
            continue
        if error > case.error:
            said = f"wrong by {error:.1e} of the largest value, {case.error:.0e} allowed"
            assert not provider.startswith(OURS), f"{case.name}: {provider} is {said}; it will not be timed"
            rows.append(Row(case.name, provider, None, None, None, name, note=f"not timed: {said}"))
            continue
        right[provider] = call
    timed = milliseconds(right)
    rows += [Row(case.name, p, *(round(t, 4) for t in ts), name, note=_share(case, ts[0])) for p, ts in timed.items()]
    return sorted(rows, key=lambda row: list(case.providers).index(row.provider))


def _share(case: Case, ms: float) -> str:
    said = []
    if case.bytes:
        said.append(f"{case.bytes / ms / 1e6:.1f} GB/s")
    if case.flops:
        said.append(f"{case.flops / ms / 1e9:.3f} TFLOP/s")
    return ", ".join(said)


def ceilings() -> list[Case]:
    """What this device does at best: a copy, and a 16-bit matrix product (float32 on a CPU)."""
    there, big = device(), device().type == "cuda"
    source = torch.randn((256 if big else 32) << 18, device=there)
    target = torch.empty_like(source)
    n, dtype = (8192, torch.bfloat16) if big else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=there, dtype=dtype) for _ in range(2))
    return [
        Case("ceiling: copy", {"torch": lambda: target.copy_(source)}, lambda: source, bytes=2 * source.nbytes),
        Case(f"ceiling: matmul {n} {str(dtype)[6:]}", {"torch": lambda: a @ b}, lambda: a @ b, flops=2 * n**3),
    ]


def fused_only(call: Callable[[], object]) -> Callable[[], object]:
    """`call`, skipped where kernels would run in the interpreter or not at all."""

    def on_gpu():
        if device().type != "cuda":
            raise SkipProvider("the kernels need a GPU; correctness on a CPU is in the tests")
        return call()

    return on_gpu


def with_gradients(call: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """`call` on the tensors, then its gradients by all of them, along the first call's output shape."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]

    def step():
        out = call(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return step


def run(cases: Iterable[Case] = (), measured: Iterable[Row] = ()) -> list[Row]:
    """Measure cases one by one, ceilings first, and print their rows as CSV; then rows that are measured elsewhere."""
    table, rows = csv.DictWriter(sys.stdout, [f.name for f in fields(Row)], lineterminator="\n"), []
    table.writeheader()
    for row in itertools.chain((row for case in (*ceilings(), *cases) for row in measure(case)), measured):
        rows.append(row)
        table.writerow(asdict(row))
        sys.stdout.flush()
    return rows


def save(rows: list[Row], op: str, folder: Path = RESULTS) -> Path:
    """Write `<device>_<op>.csv` and its figure."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = "".join(c if c.isalnum() else "_" for c in device_name().lower()).strip("_")
    path = folder / f"{slug}_{op}.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(row) for row in rows)
    figure(rows, op, path.with_suffix(".png"))
    return path


def figure(rows: list[Row], op: str, path: Path) -> None:
    """Median ms a provider, one panel a case, with bars from the 20th to the 80th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = [r for r in rows if r.median_ms is not None and not r.case.startswith("ceiling")]
    names = list(dict.fromkeys(r.case for r in timed))
    if not names:
        return
    height = [1 + 0.3 * sum(r.case == n for r in timed) for n in names]
    fig, axes = plt.subplots(len(names), 1, figsize=(8, sum(height)), height_ratios=height, squeeze=False)
    for ax, name in zip(axes[:, 0], names, strict=True):
        mine = [r for r in timed if r.case == name]
        spread = [[r.median_ms - r.p20_ms for r in mine], [r.p80_ms - r.median_ms for r in mine]]
        colors = ["tab:orange" if r.provider.startswith(OURS) else "tab:gray" for r in mine]
        ax.barh([r.provider for r in mine], [r.median_ms for r in mine], xerr=spread, color=colors)
        ax.invert_yaxis()
        ax.set_title(name, fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("ms")
    fig.suptitle(f"{op} · {rows[0].device}", fontsize=9)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
