"""Right first, then timed: a provider's result is compared with the exact one, and a wrong one is never timed.

A `Row` is a case and a provider of a kernel's benchmark, `Records` the rows of any other. Both say where they were
measured: device, versions, commit. Ceilings of the device are measured in the same run.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.figure import figure
from benchmarks.where import commit, device, device_name, setting, slug, triton_version

RESULTS = Path(__file__).parent / "results"
OURS = "nvit"


class SkipProvider(Exception):
    """This provider cannot run this case; the message says why."""


@dataclass(frozen=True)
class Case:
    """One comparison: calls by provider name, the exact result, and how far from it a result may be.

    A call whose own result is of other shapes, as gradients of cut weights are, has an attribute `comparable`: a call
    that gives the same result in the shapes of `exact`. It is compared, and never timed.

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


@dataclass(frozen=True, kw_only=True)
class Row:
    """Milliseconds of a provider: the device's, and on a GPU the host's to enqueue; a note, why a peer was skipped."""

    case: str
    provider: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    host_ms: float | None = None
    host_p20_ms: float | None = None
    host_p80_ms: float | None = None
    device: str = field(default_factory=setting)
    torch: str = torch.__version__
    triton: str = field(default_factory=triton_version)
    commit: str = field(default_factory=commit)
    note: str = ""


class Records:
    """Rows of one benchmark: `add` prints each as it comes, `save` writes `<name>_cpu.csv`, or `<GPU>_<name>.csv`."""

    def __init__(self, name: str, of: torch.device | str = "cpu", folder: Path | None = None) -> None:
        on_cpu = torch.device(of).type == "cpu"
        file = f"{name}_cpu.csv" if on_cpu else f"{slug(device_name(of))}_{name}.csv"
        self.path = (folder or RESULTS) / file
        self.rows: list[dict[str, Any]] = []
        self.where = {
            "device": device_name(of),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": commit(),
        }

    def add(self, **row: Any) -> None:
        row = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()} | self.where
        print(json.dumps(row), flush=True)
        self.rows.append(row)

    def save(self) -> None:
        names = list(dict.fromkeys(k for row in self.rows for k in row))
        _write(self.path, names, self.rows)


def _write(path: Path, names: Sequence[str], rows: Iterable[Mapping]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, names, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def relative_error(result: Tensor | tuple[Tensor, ...], exact: Tensor | tuple[Tensor, ...]) -> float:
    """Largest difference over the largest value, worst of the tensors returned; NaN counts as infinite."""
    results, exacts = ((x,) if isinstance(x, Tensor) else x for x in (result, exact))
    worst = 0.0
    for r, e in zip(results, exacts, strict=True):
        error = ((r.double() - e.double()).abs().max() / e.double().abs().max().clamp_min(1e-30)).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def gate(case: Case) -> tuple[dict[str, Callable], list[Row]]:
    """Providers whose result is right, and rows of the others; our own wrong or failing result is an error.

    Raises:
        AssertionError: our kernel's result is further from the exact one than the case allows.
    """
    exact = case.exact()
    right: dict[str, Callable] = {}
    rows = []
    for provider, call in case.providers.items():
        try:
            error = relative_error(getattr(call, "comparable", call)(), exact)
        except SkipProvider as reason:
            rows.append(Row(case=case.name, provider=provider, note=f"skipped: {reason}"))
            continue
        except Exception as failed:  # whatever a peer of another version raises
            if provider.startswith(OURS):
                raise
            reason = (str(failed).strip().splitlines() or [type(failed).__name__])[0][:160]
            rows.append(Row(case=case.name, provider=provider, note=f"skipped: {reason}"))
            continue
        if error > case.error:
            said = f"wrong by {error:.1e} of the largest value, {case.error:.0e} allowed"
            assert not provider.startswith(OURS), f"{case.name}: {provider} is {said}; it will not be timed"
            rows.append(Row(case=case.name, provider=provider, note=f"not timed: {said}"))
            continue
        right[provider] = call
    return right, rows


def measure(case: Case) -> list[Row]:
    """Rows of a case in the order of its providers; a peer that is wrong or unsupported has no time but a note.

    Raises:
        AssertionError: our own result is wrong.
    """
    right, rows = gate(case)
    for provider, found in timing.timings(right).items():
        median, p20, p80 = (round(t, 4) for t in found.ms)
        host, host_p20, host_p80 = (round(t, 4) for t in found.host_ms) if found.host_ms else (None, None, None)
        note = ", ".join(part for part in (_share(case, found.ms[0]), found.note) if part)
        rows.append(Row(case=case.name, provider=provider, median_ms=median, p20_ms=p20, p80_ms=p80, host_ms=host,
                        host_p20_ms=host_p20, host_p80_ms=host_p80, note=note))  # fmt: skip
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
    there = device()
    big = there.type == "cuda"
    source = torch.randn((256 if big else 32) << 18, device=there)
    target = torch.empty_like(source)
    n, dtype = (8192, torch.bfloat16) if big else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=there, dtype=dtype) for _ in range(2))
    return [
        Case("ceiling: copy", {"torch": lambda: target.copy_(source)}, lambda: source, bytes=2 * source.nbytes),
        Case(f"ceiling: matmul {n} {str(dtype)[6:]}", {"torch": lambda: a @ b}, lambda: a @ b, flops=2 * n**3),
    ]


def run(cases: Iterable[Case] = (), measured: Iterable[Row] = ()) -> list[Row]:
    """Measure cases one by one, ceilings first, and print their rows as CSV; then rows that are measured elsewhere."""
    table = csv.DictWriter(sys.stdout, [f.name for f in fields(Row)], lineterminator="\n")
    rows = []
    table.writeheader()
    for row in itertools.chain((row for case in (*ceilings(), *cases) for row in measure(case)), measured):
        rows.append(row)
        table.writerow(asdict(row))
        sys.stdout.flush()
    return rows


def path_of(op: str, folder: Path | None = None) -> Path:
    """Where rows of an op measured here are kept."""
    return (folder or RESULTS) / f"{slug(setting())}_{op}.csv"


def write(path: Path, rows: Sequence[Row]) -> None:
    """The CSV of a kernel's rows."""
    _write(path, [f.name for f in fields(Row)], map(asdict, rows))


def save(rows: Sequence[Row], op: str, folder: Path | None = None) -> Path:
    """Write `<device>_<op>.csv` and its figure, into `results/` without a folder."""
    path = path_of(op, folder)
    write(path, rows)
    figure(rows, op, path.with_suffix(".png"), OURS)
    return path
