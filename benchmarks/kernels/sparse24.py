"""2:4 compression against torch's own conversions, each timing behind a byte-for-byte check.

    python -m benchmarks.kernels.sparse24 --csv benchmarks/results/sparse24_cpu.csv

Prints a JSON line per row and appends the same to the CSV. With a GPU it measures there too: ours, torch's compressors
and the device's copy bandwidth, in one run; `--only gpu` leaves the CPU rows out.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.sparse import (
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
    to_sparse_semi_structured,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from benchmarks.timing import Timing, in_turns, on_gpu, spread
from benchmarks.where import commit, device_name, slug, triton_version
from nvit_kernels import _native, sparse24

SHAPES = {"proj": (768, 768), "qkv": (2304, 768), "fc1": (3072, 768), "fc2": (768, 3072)}  # one block of DeiT-B
FIELDS = ["case", "provider", "median_ms", "p20_ms", "p80_ms", "times_peer", "gbps", "device", "threads"]
FIELDS += ["torch", "triton", "commit", "host_ms", "note"]
COPY = "copy of as many bytes"


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


def on_cpu(providers: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """Timings of all providers, taken in turn."""
    times = in_turns(providers, least=5, dropped=3, seconds=seconds)
    return {name: Timing(spread([1e3 * t for t in mine])) for name, mine in times.items()}


def rows(case: str, times: Mapping[str, Timing], peer: str, traffic: int, context: dict) -> list[dict]:
    """A row a provider: how many times as fast as `peer` it is, and GB/s of the least traffic."""
    found = []
    for provider, timing in times.items():
        median, p20, p80 = timing.ms
        row = {"case": case, "provider": provider, "median_ms": median, "p20_ms": p20, "p80_ms": p80}
        row |= {"times_peer": times[peer].ms[0] / median, "gbps": traffic / median / 1e6}
        row |= context | {"host_ms": timing.host_ms and timing.host_ms[0], "note": timing.note}
        found.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return found


def cpu_layer(name: str, shape: tuple[int, int], seconds: float, context: dict) -> list[dict]:
    """Compression and decompression of one weight."""
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
    found = rows(f"compress {size}", on_cpu(compress, seconds), peer, traffic, context)
    peer = "torch to_dense_cutlass"
    decompress = {
        peer: lambda: sparse_semi_structured_to_dense_cutlass(packed.values, packed.meta),
        "ours": lambda: sparse24.decompress_2to4(packed.values, packed.meta),
    }
    return found + rows(f"decompress {size}", on_cpu(decompress, seconds / 2), peer, traffic, context)


def cpu_model(seconds: float, context: dict) -> list[dict]:
    """All blocks of DeiT-B in one call."""
    masters = [torch.randn(shape) for _ in range(12) for shape in SHAPES.values()]
    halves = [m.half() for m in masters]
    check(halves[:4], torch.float16)
    metas = [p.meta for p in sparse24.compress_2to4_many(halves)]
    compress, repack = sparse24.CompressPlan(halves), sparse24.RepackPlan(halves, metas)
    peer = "torch from_dense_cutlass, one by one"
    providers = {
        peer: lambda: [sparse_semi_structured_from_dense_cutlass(h) for h in halves],
        "ours, one call": lambda: sparse24.compress_2to4_many(halves),
        "ours, one call, from float32 masters": lambda: sparse24.compress_2to4_many(masters, dtype=torch.float16),
        "ours, values only (repack), one call": lambda: sparse24.repack_2to4_many(halves, metas),
        "ours, planned": lambda: compress(check=True),
        "ours, planned, values only (repack)": lambda: repack(check=True),
    }
    traffic = moved_bytes(halves, torch.float16)
    return rows("compress all blocks of DeiT-B float16", on_cpu(providers, seconds), peer, traffic, context)


def copy_of(traffic: int) -> Callable[[], object]:
    """The ceiling: a copy that reads and writes as many bytes in all."""
    source = torch.empty(traffic // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def gpu_layer(name: str, shape: tuple[int, int], seconds: float, context: dict) -> list[dict]:
    """Compression of one weight, beside each compressor torch has."""
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
        "torch to_sparse_semi_structured, pruned already": lambda: to_sparse_semi_structured(pruned),
        "torch CUTLASS from_dense, pruned already": lambda: SparseSemiStructuredTensorCUTLASS.from_dense(pruned),
        "torch cuSPARSELt from_dense, pruned already": lambda: SparseSemiStructuredTensorCUSPARSELT.from_dense(pruned),
        "torch _cslt_compress, pruned already": lambda: torch._cslt_compress(pruned),
        "torch _sparse_semi_structured_tile": lambda: torch._sparse_semi_structured_tile(x, "", True),
    }
    case = f"compress {name} {shape[0]}x{shape[1]} float16"
    return gpu_rows(case, providers, seconds, moved_bytes([x], x.dtype), context)


def gpu_model(seconds: float, context: dict) -> list[dict]:
    """All blocks of DeiT-B in one call."""
    halves = [torch.randn(shape, device="cuda").half() for _ in range(12) for shape in SHAPES.values()]
    compress = sparse24.CompressPlan(halves)
    repack = sparse24.RepackPlan(halves, [p.meta for p in compress.packed])
    providers = {
        COPY: copy_of(moved_bytes(halves, torch.float16)),
        "ours, one call": lambda: sparse24.compress_2to4_many(halves, check=False),
        "ours, planned": compress,
        "ours, planned, values only (repack)": repack,
        "torch CUTLASS from_dense, one by one": lambda: [
            SparseSemiStructuredTensorCUTLASS.from_dense(h) for h in halves
        ],
        "torch _cslt_compress, one by one": lambda: [torch._cslt_compress(h) for h in halves],
    }
    case = "compress all blocks of DeiT-B float16"
    return gpu_rows(case, providers, seconds, moved_bytes(halves, torch.float16), context)


def gpu_rows(case: str, providers: dict[str, Callable], seconds: float, traffic: int, context: dict) -> list[dict]:
    """Rows of a case: `seconds` in all for the providers that run here."""
    able = runnable(providers, case)
    times = {name: on_gpu(call, seconds / len(able)) for name, call in able.items()}
    return rows(case, times, COPY, traffic, context)


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


def append(path: Path, found: Sequence[dict]) -> None:
    """Add rows to a CSV, in the columns that it has if it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = next(csv.reader(path.open())) if path.exists() else FIELDS
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerows(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--out", type=Path, help="write the GPU's rows into this folder, as <GPU>_sparse24.csv")
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--only", choices=("cpu", "gpu"), help="where to measure; both by default")
    parser.add_argument("--layers", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="of a block")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    native = _native.load()
    if not native.cpu:
        raise SystemExit(f"nothing to measure: {native.why_not_cpu}.")
    context = {"torch": torch.__version__, "triton": triton_version(), "commit": commit()}
    shapes = {name: SHAPES[name] for name in options.layers}
    found = []
    if options.only != "gpu":
        here = {"device": device_name("cpu"), "threads": options.threads, **context}
        for name, shape in shapes.items():
            found += cpu_layer(name, shape, options.seconds, here)
        found += cpu_model(options.seconds * 4, here)
    if torch.cuda.is_available() and native.cuda and options.only != "cpu":
        there = {"device": device_name("cuda"), "threads": 0, **context}
        for name, shape in {**shapes, "large": (4096, 4096)}.items():
            found += gpu_layer(name, shape, options.seconds, there)
        found += gpu_model(options.seconds * 2, there)
    elif options.only != "cpu":
        print(f"no GPU rows: {native.why_not_cuda or 'no CUDA device'}", file=sys.stderr)
    for row in found:
        print(json.dumps(row))
    if options.csv is not None:
        append(options.csv, found)
    if options.out is not None and torch.cuda.is_available():
        path = options.out / f"{slug(device_name('cuda'))}_sparse24.csv"
        path.unlink(missing_ok=True)
        append(path, [row for row in found if row["device"] == device_name("cuda")])
    return 0


if __name__ == "__main__":
    sys.exit(main())
