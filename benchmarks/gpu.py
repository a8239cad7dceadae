"""All that a GPU shows, in one command: build, tests, kernels beside their peers, steps, loop, latencies, 2:4.

    python -m benchmarks.gpu [--out FOLDER] [--only STAGE ...] [--seconds 480]        `make gpu` calls it

Each stage is one or several processes with a time limit of their own; one that fails, hangs or cannot run stops none of
those after it, and its rows so far are kept. CSVs and a log for each stage go into the folder, benchmarks/results by
default (logs beside it); one table of what was found comes at the end. Nothing is fetched from anywhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_report import report
from benchmarks.harness import RESULTS

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
BUILD = """
import os, runpy, sys, torch
major, minor = torch.cuda.get_device_capability()
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
"""The native library for the GPU that is here, and no other."""
SECONDS = 480.0
"""All stages together, whatever their limits add up to: what is late is cut, and what comes after it skipped."""
SKIPPED = 77
"""The exit status by which a stage says that it cannot run here; the last line it printed says why."""


@dataclass(frozen=True)
class Stage:
    """Commands that run at the same time, within a limit.

    Attributes:
        limit: seconds.
        commands: words of each process; `OUT` stands for the folder of CSVs.
        needs: modules without which the stage is skipped.
        gpu: whether it is skipped without a GPU.
        beside: whether it starts together with the stage before it.
        environment: variables besides those that every stage has.
    """

    name: str
    limit: float
    commands: Sequence[Sequence[str]]
    needs: Sequence[str] = ()
    gpu: bool = True
    beside: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: `passed`, `failed`, `timed out` or `skipped`, after so many seconds, with a note."""

    name: str
    state: str
    seconds: float
    note: str


def module(name: str, *words: str) -> list[str]:
    return [PYTHON, "-m", name, *words]


def gpu_tests() -> list[str]:
    """Test files with a test for GPUs: collecting all the others takes longer than running these."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(p.relative_to(ROOT)) for p in files if "mark.gpu" in p.read_text()]


def pytest_commands(processes: int) -> list[list[str]]:
    """pytest in so many processes by xdist, or in one a file where that is missing."""
    words = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.told_at_once", "--tb=short"]
    if importlib.util.find_spec("xdist"):
        return [module("pytest", *words, "-n", str(processes), "--dist", "worksteal", *gpu_tests())]
    return [module("pytest", *words, file) for file in gpu_tests()]


def stages() -> list[Stage]:
    """In the order they run: what others need first, what may be refused last."""
    engine = ("tyro", "timm", "accelerate")
    kernels = "benchmarks.kernels"
    step = "benchmarks.engine.training_step"
    ops = ("attention", "kept_layer_norm", "mlp", "group_dot", "merge_tokens")
    checks = [module(kernels, "--gate", op) for op in ops]
    if importlib.util.find_spec("tyro"):
        checks.append(module(step, "--only-compile"))
    return [
        Stage("build", 90, [[PYTHON, "-c", BUILD]], environment={"NVIT_BUILD_CUDA": "1"}),
        # Results are compared and peers compiled by all ops at once; the stages that time find the caches filled.
        Stage("check", 90, checks, beside=True, environment={"TORCHINDUCTOR_COMPILE_THREADS": "4"}),
        Stage("tests", 110, pytest_commands(max(2, min(14, (os.cpu_count() or 4) - 2))), ("pytest", "hypothesis")),
        Stage("attention", 80, [module(kernels, "attention", "--out", "OUT")]),
        Stage("kept_layer_norm", 25, [module(kernels, "kept_layer_norm", "--out", "OUT")]),
        Stage("mlp", 45, [module(kernels, "mlp", "--out", "OUT")]),
        Stage("merge_tokens", 30, [module(kernels, "merge_tokens", "--out", "OUT")], ("timm",)),
        Stage("step", 60, [module(step, "--out", "OUT")], engine),
        Stage("loop", 50, [module("benchmarks.engine.pruning_loop", "--out", "OUT")], engine),
        Stage("latency", 60, [module("benchmarks.engine.pruned_deit", "--out", "OUT")], engine),
        Stage("tokens", 60, [module("benchmarks.engine.merged_deit", "--out", "OUT")], engine),
        Stage(
            "sparse24", 30, [module("benchmarks.kernels.sparse24", "--only", "gpu", "--seconds", "1", "--out", "OUT")]
        ),
        Stage("group_dot", 30, [module(kernels, "group_dot", "--out", "OUT")]),
        Stage("sanitizer", 45, [module("benchmarks.sanitizer")], ("pytest", "hypothesis")),
    ]


def obstacle(stage: Stage, on_gpu: bool) -> str | None:
    """Why a stage cannot run here, or None."""
    if missing := [name for name in stage.needs if importlib.util.find_spec(name) is None]:
        return f"{', '.join(missing)} not installed"
    return "no CUDA device" if stage.gpu and not on_gpu else None


def surroundings(scratch: Path, stage: Stage) -> dict[str, str]:
    """Variables of a stage's processes: this tree first, no network, choices measured afresh in a folder of its own."""
    paths = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    own = {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    # What processes measure while they share the GPU must not decide for those that have it alone.
    shared = "check" if len(stage.commands) > 1 or stage.name == "tests" else "timed"
    own |= {"NVIT_CACHE": str(scratch / shared)}
    if stage.name == "tests":
        own["OMP_NUM_THREADS"] = "1"
    return os.environ | own | dict(stage.environment)


def stop(process: subprocess.Popen) -> None:
    """End a process and all it started."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            return
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            continue


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip(" =")[:160] if lines else ""


def run_stage(stage: Stage, limit: float, out: Path, logs: Path, scratch: Path) -> Outcome:
    """Run a stage's processes together until all have ended or the limit is over; never raises for what they do."""
    start = time.monotonic()
    running: list[tuple[subprocess.Popen, Path]] = []
    environment = surroundings(scratch, stage)
    for i, words in enumerate(stage.commands):
        log = logs / (f"{stage.name}.log" if len(stage.commands) == 1 else f"{stage.name}_{i}.log")
        with log.open("w") as file:
            print("$", *words, file=file, flush=True)
            process = subprocess.Popen(
                [str(out) if word == "OUT" else word for word in words],
                cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        running.append((process, log))
    late = []
    for process, log in running:
        try:
            process.wait(max(0.0, start + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            late.append(log)
        stop(process)  # of one that has ended: what it left behind
    seconds = time.monotonic() - start
    failed = [(p.returncode, log) for p, log in running if log not in late and p.returncode not in (0, SKIPPED)]
    if late:
        return Outcome(stage.name, "timed out", seconds, f"limit {limit:.0f} s; last: {last_line(late[0])}")
    if failed:
        return Outcome(stage.name, "failed", seconds, f"exit {failed[0][0]}: {last_line(failed[0][1])}")
    skipped = [log for p, log in running if p.returncode == SKIPPED]
    state = "skipped" if len(skipped) == len(running) else "passed"
    return Outcome(stage.name, state, seconds, last_line((skipped or [log for _, log in running])[0]))


def run(chosen: Sequence[Stage], out: Path, logs: Path, seconds: float, on_gpu: bool) -> list[Outcome]:
    """All stages in order, each within its limit and what is left of `seconds`."""
    end = time.monotonic() + seconds
    groups: list[list[Stage]] = []
    for stage in chosen:
        if stage.beside and groups:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(8) as pool:

        def attempt(stage: Stage) -> Outcome:
            left = end - time.monotonic()
            if reason := obstacle(stage, on_gpu):
                return Outcome(stage.name, "skipped", 0.0, reason)
            if left < 5:
                return Outcome(stage.name, "skipped", 0.0, f"the {seconds:.0f} s of all stages are over")
            print(f"{stage.name} …", flush=True)
            try:
                return run_stage(stage, min(stage.limit, left), out, logs, Path(scratch))
            except OSError as error:
                return Outcome(stage.name, "failed", 0.0, str(error))

        for group in groups:
            for outcome in pool.map(attempt, group):
                outcomes.append(outcome)
                print(f"{outcome.name}: {outcome.state} after {outcome.seconds:.0f} s. {outcome.note}", flush=True)
    return outcomes


def gpu_there() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> int:
    every = stages()
    names = [stage.name for stage in every]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for CSVs and the table")
    parser.add_argument("--logs", type=Path, help="folder for the stages' logs; OUT/logs, or runs/gpu by default")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=f"of {', '.join(names)}")
    parser.add_argument("--skip", nargs="+", choices=names, metavar="STAGE", default=[], help="all but these")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages together")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    logs = (arguments.logs or (ROOT / "runs/gpu" if out == RESULTS.resolve() else out / "logs")).resolve()
    for folder in (out, logs):
        folder.mkdir(parents=True, exist_ok=True)
    chosen = [s for s in every if s.name in (arguments.only or names) and s.name not in arguments.skip]
    started = time.time()
    outcomes = run(chosen, out, logs, arguments.seconds, gpu_there())
    table = report(outcomes, out, since=started)
    (logs / "report.md").write_text(table)
    print(table)
    return int(any(o.state in ("failed", "timed out") for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
