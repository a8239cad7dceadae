"""2:4 compression against torch's own conversions, each timing behind a byte-for-byte check.

    python -m benchmarks.bench_sparse24 --csv benchmarks/results/sparse24_cpu.csv

Prints a JSON line per row and appends the same to the CSV. With a GPU it measures there too: ours, torch's compressors
and the device's copy bandwidth, in one run.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from nvit_kernels import _native, sparse24

SHAPES = {"proj": (768, 768), "qkv": (2304, 768), "fc1": (3072, 768), "fc2": (768, 3072)}  # one block of DeiT-B
FIELDS = ["case", "provider", "median_ms", "p20_ms", "p80_ms", "times_peer", "gbps", "device", "threads"]
FIELDS += ["torch", "triton", "commit"]


def commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def processor() -> str:
    """The machine's own name for its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def time_cpu(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def time_gpu(run: Callable[[], object]) -> float:
    """One run between events, after 256 MB of writes have emptied the cache."""
    torch.empty(2**26, dtype=torch.int32, device="cuda").zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(providers: dict[str, Callable[[], object]], clock: Callable, seconds: float) -> dict[str, list[float]]:
    """Times of each provider, taken in turns so that a busy moment hits all of them; the first few are dropped."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    until = time.monotonic() + seconds
    while time.monotonic() < until or min(map(len, times.values())) < 8:
        for name, run in providers.items():
            times[name].append(clock(run))
    return {name: t[3:] for name, t in times.items()}


def check(dense: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Refuse to time a wrong result."""
    for x, packed in zip(dense, sparse24.compress_2to4_many(dense, dtype=dtype), strict=True):
        pruned = torch.where(sparse24.unpack_bits(packed.bitmask), x, 0).to(dtype)
        values, meta = sparse_semi_structured_from_dense_cutlass(pruned)
        if not (torch.equal(packed.values, values) and torch.equal(packed.meta, meta)):
            raise SystemExit(
                f"compress_2to4 differs from torch's conversion at {tuple(x.shape)} {dtype}; nothing timed."
            )
        if not torch.equal(sparse24.decompress_2to4(packed.values, packed.meta), pruned):
            raise SystemExit(f"decompress_2to4 differs at {tuple(x.shape)} {dtype}; nothing timed.")


def moved_bytes(dense: list[torch.Tensor], to: torch.dtype) -> int:
    """Least traffic: the matrix in, half of it, metadata and bitmask out."""
    return sum(x.numel() * (x.itemsize * 8 + to.itemsize * 4 + 1 + 1) // 8 for x in dense)


def rows(case: str, times: dict[str, list[float]], peer: str, traffic: int, context: dict) -> list[dict]:
    peer_ms = statistics.median(times[peer])
    out = []
    for provider, t in times.items():
        median = statistics.median(t)
        p20, p80 = (statistics.quantiles(t, n=5)[i] for i in (0, 3))
        row = {"case": case, "provider": provider, "median_ms": median, "p20_ms": p20, "p80_ms": p80}
        row |= {"times_peer": peer_ms / median, "gbps": traffic / median / 1e6}
        out.append({k: round(v, 4) if isinstance(v, float) else v for k, v in (row | context).items()})
    return out


def cpu_layer(name: str, shape: tuple[int, int], seconds: float, context: dict) -> list[dict]:
    masters = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    check([masters], torch.float16)
    check([masters.half()], torch.float16)
    packed = sparse24.compress_2to4(masters, dtype=torch.float16)
    pruned = sparse24.decompress_2to4(packed.values, packed.meta)  # torch's takes nothing but pruned matrices
    traffic, size = moved_bytes([pruned], pruned.dtype), f"{name} {shape[0]}x{shape[1]} float16"
    peer = "torch from_dense_cutlass, pruned already"
    compress = {
        peer: lambda: sparse_semi_structured_from_dense_cutlass(pruned),
        "ours, prune + compress + bitmask": lambda: sparse24.compress_2to4(pruned),
        "ours, from float32 masters": lambda: sparse24.compress_2to4(masters, dtype=torch.float16),
        "ours, packed mask given": lambda: sparse24.compress_2to4(pruned, packed.bitmask),
        "ours, values only (repack)": lambda: sparse24.repack_2to4(pruned, packed.meta),
    }
    found = rows(f"compress {size}", measure(compress, time_cpu, seconds), peer, traffic, context)
    peer = "torch to_dense_cutlass"
    decompress = {
        peer: lambda: sparse_semi_structured_to_dense_cutlass(packed.values, packed.meta),
        "ours": lambda: sparse24.decompress_2to4(packed.values, packed.meta),
    }
    return found + rows(f"decompress {size}", measure(decompress, time_cpu, seconds / 2), peer, traffic, context)


def cpu_model(seconds: float, context: dict) -> list[dict]:
    masters = [torch.randn(shape) for _ in range(12) for shape in SHAPES.values()]
    halves = [m.half() for m in masters]
    check(halves[:4], torch.float16)
    metas = [p.meta for p in sparse24.compress_2to4_many(halves)]
    peer = "torch from_dense_cutlass, one by one"
    providers = {
        peer: lambda: [sparse_semi_structured_from_dense_cutlass(h) for h in halves],
        "ours, one call": lambda: sparse24.compress_2to4_many(halves),
        "ours, one call, from float32 masters": lambda: sparse24.compress_2to4_many(masters, dtype=torch.float16),
        "ours, values only (repack), one call": lambda: sparse24.repack_2to4_many(halves, metas),
    }
    times = measure(providers, time_cpu, seconds)
    return rows("compress all blocks of DeiT-B float16", times, peer, moved_bytes(halves, torch.float16), context)


def copy_of(traffic: int) -> Callable[[], object]:
    """The ceiling: a copy that reads and writes as many bytes in all."""
    source = torch.empty(traffic // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


COPY = "copy of as many bytes"


def gpu_layer(name: str, shape: tuple[int, int], seconds: float, context: dict) -> list[dict]:
    masters = torch.randn(shape, device="cuda")
    x = masters.half()
    check([x], torch.float16)
    check([masters], torch.float16)
    packed = sparse24.compress_2to4(x)
    pruned = sparse24.decompress_2to4(packed.values, packed.meta)
    providers = {
        COPY: copy_of(moved_bytes([x], x.dtype)),
        "ours, prune + compress + bitmask": lambda: sparse24.compress_2to4(x, check=False),
        "ours, checked": lambda: sparse24.compress_2to4(x),
        "ours, from float32 masters": lambda: sparse24.compress_2to4(masters, dtype=torch.float16, check=False),
        "ours, values only (repack)": lambda: sparse24.repack_2to4(x, packed.meta, check=False),
        "torch CUTLASS from_dense, pruned already": lambda: SparseSemiStructuredTensorCUTLASS.from_dense(pruned),
        "torch cuSPARSELt from_dense, pruned already": lambda: SparseSemiStructuredTensorCUSPARSELT.from_dense(pruned),
        "torch _cslt_compress, pruned already": lambda: torch._cslt_compress(pruned),
        "torch _sparse_semi_structured_tile": lambda: torch._sparse_semi_structured_tile(x, "", True),
    }
    case = f"compress {name} {shape[0]}x{shape[1]} float16"
    times = measure(runnable(providers, case), time_gpu, seconds)
    return rows(case, times, COPY, moved_bytes([x], x.dtype), context)


def gpu_model(seconds: float, context: dict) -> list[dict]:
    halves = [torch.randn(shape, device="cuda").half() for _ in range(12) for shape in SHAPES.values()]
    traffic = moved_bytes(halves, torch.float16)
    providers = {
        COPY: copy_of(traffic),
        "ours, one call": lambda: sparse24.compress_2to4_many(halves, check=False),
        "torch CUTLASS from_dense, one by one": lambda: [
            SparseSemiStructuredTensorCUTLASS.from_dense(h) for h in halves
        ],
        "torch _cslt_compress, one by one": lambda: [torch._cslt_compress(h) for h in halves],
    }
    case = "compress all blocks of DeiT-B float16"
    return rows(case, measure(runnable(providers, case), time_gpu, seconds), COPY, traffic, context)


def runnable(providers: dict[str, Callable], case: str) -> dict[str, Callable]:
    """Ours, and the peers this machine supports; the others are named with their reason. Ours may not fail."""
    able = {}
    for name, run in providers.items():
        try:
            run()
            torch.cuda.synchronize()
            able[name] = run
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if name.startswith("ours"):
                raise
            print(f"skipped: {case}: {name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return able


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    native = _native.load()
    if not native.cpu:
        raise SystemExit(f"nothing to measure: {native.why_not_cpu}.")
    context = {"torch": torch.__version__, "triton": version("triton"), "commit": commit()}
    on_cpu = {"device": processor(), "threads": options.threads, **context}
    found = [row for name, shape in SHAPES.items() for row in cpu_layer(name, shape, options.seconds, on_cpu)]
    found += cpu_model(options.seconds * 4, on_cpu)
    if torch.cuda.is_available() and native.cuda:
        on_gpu = {"device": torch.cuda.get_device_name(), "threads": 0, **context}
        for name, shape in {**SHAPES, "large": (4096, 4096)}.items():
            found += gpu_layer(name, shape, options.seconds, on_gpu)
        found += gpu_model(options.seconds * 2, on_gpu)
    else:
        print(f"no GPU rows: {native.why_not_cuda or 'no CUDA device'}", file=sys.stderr)
    for row in found:
        print(json.dumps(row))
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        new = not options.csv.exists()
        with options.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
