"""What the CPU benchmarks share: rows printed as JSON and written to a CSV, CPU seconds, peak memory of a child."""

from __future__ import annotations

import csv
import json
import multiprocessing
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nvit.latency import device_name
from nvit.memory import Meter

RESULTS = Path(__file__).parent / "results"


def _commit() -> str:
    """The commit the code is at, with a + where files that it tracks have changed since."""
    try:
        head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, text=True).strip()
        changed = subprocess.check_output(["git", "status", "--porcelain", "-uno", "../nvit"], cwd=RESULTS.parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


class Records:
    """Rows of one benchmark: `add` prints each as it comes, `save` writes `results/<name>_cpu.csv`."""

    def __init__(self, name: str) -> None:
        self.path, self.rows = RESULTS / f"{name}_cpu.csv", []
        self.where = {
            "device": device_name("cpu"),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": _commit(),
        }

    def add(self, **row: Any) -> None:
        row = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()} | self.where
        print(json.dumps(row), flush=True)
        self.rows.append(row)

    def save(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("w", newline="") as f:
            fields = list(dict.fromkeys(k for row in self.rows for k in row))
            writer = csv.DictWriter(f, fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def cpu_seconds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each call, all of them in turn, `rounds` times after one warm-up round."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seen[name].append(time.process_time() - start)
    return {name: times[1:] for name, times in seen.items()}


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over rounds of `a / b`: what slows a round down slows both."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def _peak_child(pipe, prepare: Callable[[], Callable[[], object]]) -> None:
    step = prepare()
    meter = Meter("cpu")  # what preparation freed does not hide what the step takes
    start = meter.held
    step()
    pipe.send((meter.peak - start) / 2**20)


def peak_mib(prepare: Callable[[], Callable[[], object]]) -> float:
    """MiB by which the call that `prepare` returns raises resident memory at most, in a forked child. Linux only."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    child = fork.Process(target=_peak_child, args=(there, prepare))
    child.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError("the child that measures memory died; see its error above") from None
    finally:
        child.join()
