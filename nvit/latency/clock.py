"""The only stopwatch in nvit."""

from __future__ import annotations

import copy
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import adapters
from ..export.pieces import TORCH, Call, ready, runtime_version
from ..utils import modes
from ..utils.memory import keep_freed_memory
from .spread import ROUNDS, steady, typical

ENOUGH_MS, MOST_REPLAYS = 2.0, 20
"""Replays of a graph between two events: until they take so long together, and no more than so many."""

PATIENCE = 8
"""Times the seconds given that a busy machine may take."""


def device_name(device: torch.device | str) -> str:
    """The processor's or GPU's own name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")] if cpuinfo.exists() else []
    return models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Setting:
    """What a latency was measured on; a table speaks for no other setting.

    Attributes:
        mode: `eager`, `graph` or `compile`, see `utils.modes`; older tables are eager.
        runtime: what computes, `torch` or one of `export.pieces.RUNTIMES`; older tables are torch's.
    """

    device: str
    dtype: str
    batch_size: int
    tokens: int
    threads: int
    versions: str
    mode: str = "eager"
    runtime: str = TORCH

    @property
    def in_words(self) -> str:
        """`NVIDIA H200, bfloat16, graph, 197 tokens`; on a CPU with its threads."""
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        how = self.mode if self.runtime == TORCH else self.runtime
        return f"{self.device}, {self.dtype}, {how}, {self.tokens} tokens{threads}"


def current_setting(
    device: torch.device | str,
    dtype: torch.dtype,
    batch_size: int,
    tokens: int,
    mode: str = "eager",
    runtime: str = TORCH,
) -> Setting:
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 0
    return Setting(
        device_name(device),
        str(dtype).removeprefix("torch."),
        batch_size,
        tokens,
        threads,
        runtime_version(runtime),
        mode,
        runtime,
    )


def as_deployed(
    device: torch.device | str, mode: str | None = None, dtype: torch.dtype | str | None = None
) -> tuple[str, torch.dtype]:
    """Mode and dtype as models are served on a device, where nothing else is asked for: on CUDA graph replays in
    bfloat16, elsewhere eager calls in float32.

    Raises:
        ValueError: a mode nobody knows, or one that this device has not.
    """
    cuda = torch.device(device).type == "cuda"
    mode = mode or ("graph" if cuda else "eager")
    if mode not in modes.RUNNERS:
        raise ValueError(f"latency mode {mode!r} is unknown; expected one of {', '.join(modes.RUNNERS)}")
    if mode == "graph" and not cuda:
        raise ValueError("latency mode graph needs a CUDA GPU, and this is a CPU; take eager or compile")
    dtype = dtype or (torch.bfloat16 if cuda else torch.float32)
    return mode, getattr(torch, dtype) if isinstance(dtype, str) else dtype


def check_runtime(runtime: str, device: torch.device | str, mode: str, dtype: torch.dtype) -> None:
    """Raise ValueError where a runtime is unknown, not installed, or cannot be timed so."""
    runtime_version(runtime)
    if runtime != TORCH and (torch.device(device).type, mode, dtype) != ("cpu", "eager", torch.float32):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"runtime {runtime} is timed on the CPU in float32, as it is; found {device}, {mode}, {name}. "
            "Take --device cpu and leave out --latency-mode and --latency-dtype, or --runtime torch"
        )


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in a dtype: itself where it has it already, else a copy."""
    return model if next(model.parameters()).dtype == dtype else copy.deepcopy(model).to(dtype)


def _now(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "cpu" and torch.get_num_threads() == 1:
        # A lone thread's own time is its latency on an idle core, whatever else the machine does meanwhile.
        return time.thread_time()
    return time.perf_counter()


class Stopwatch:
    """Functions made ready one by one, and then timed in turn, round after round, so that drift meets all alike.

    Attributes:
        first: seconds that each took to be made ready and run once: what is chosen, tuned, compiled or captured at
            first use.
    """

    def __init__(self, device: torch.device | str, mode: str = "eager") -> None:
        self.device = torch.device(device)
        self._runner, self._replays = modes.RUNNERS[mode], mode != "eager"
        self._memory = modes.shared_memory(self.device)
        self._runs: list[tuple[Callable[[], Any], int]] = []
        self.first: list[float] = []
        if self.device.type == "cpu":
            keep_freed_memory(True)

    def add(self, function: Callable[..., Any], *inputs: Tensor) -> None:
        """Make a function ready, to be timed on `inputs`; the first run is its warm-up."""
        start = time.perf_counter()
        run = self._runner(function, inputs, self._memory)
        run()
        _now(self.device)
        self.first.append(time.perf_counter() - start)
        repeats = 1
        if self._replays and self.device.type == "cuda":
            repeats = min(MOST_REPLAYS, math.ceil(ENOUGH_MS / max(self._ms(run, 1), 1e-3)))
        self._runs.append((run, repeats))

    def _ms(self, run: Callable[[], Any], repeats: int) -> float:
        """Milliseconds of a run: of graphs the device's own time, between two events."""
        if not self._replays or self.device.type != "cuda":
            start = _now(self.device)
            for _ in range(repeats):
                run()
            return (_now(self.device) - start) * 1e3 / repeats
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / repeats

    def round(self) -> list[float]:
        """Milliseconds of every function, each timed once."""
        return [self._ms(run, repeats) for run, repeats in self._runs]

    def rounds(self, end: float, least: int = 1) -> np.ndarray:
        """Milliseconds of every function in rounds, at least so many, until `time.perf_counter()` is `end`:
        `(rounds, functions)`."""
        rounds = [self.round() for _ in range(least)]
        while time.perf_counter() < end:
            rounds.append(self.round())
        return np.array(rounds)

    def medians(self, end: float) -> list[float]:
        """Median milliseconds of every function over `rounds`."""
        return np.median(self.rounds(end), axis=0).tolist()


def time_each(calls: Sequence[Callable[[], object]], device: torch.device | str, seconds: float) -> list[float]:
    """Median milliseconds of each call, all of them in turn, after one warm-up of each, in about `seconds`."""
    end = time.perf_counter() + seconds
    watch = Stopwatch(device)
    for call in calls:
        watch.add(call)
    return watch.medians(end)


def in_runtime(calls: Sequence[Call], runtime: str) -> list[Callable[[], Any] | None]:
    """What runs each call in a runtime, on as many threads as torch has; None in torch itself."""
    return [None] * len(calls) if runtime == TORCH else ready(calls, runtime, torch.get_num_threads())


@torch.inference_mode()
def time_rounds(
    models: Sequence[nn.Module], images: Tensor, seconds: float, mode: str = "eager", runtime: str = TORCH
) -> np.ndarray:
    """Milliseconds of a forward pass of each model on `images` in a runtime, in turn: `(rounds, models)`.

    For about `seconds`, and on a busy machine up to `PATIENCE` times as long, until the models' ratios are `steady`.
    """
    was = [m.training for m in models]
    runs = in_runtime([(m.eval(), partial(adapters.predict, m), images) for m in models], runtime)
    end = time.perf_counter() + seconds
    watch = Stopwatch(images.device, mode)
    for model, run in zip(models, runs, strict=True):
        watch.add(*((model, images) if run is None else (run,)))
    times = watch.rounds(end, ROUNDS)
    while not steady(times) and time.perf_counter() < end + (PATIENCE - 1) * seconds:
        times = np.concatenate([times, watch.rounds(0.0)])
    for m, training in zip(models, was, strict=True):
        m.train(training)
    return times


def time_models(models: Sequence[nn.Module], images: Tensor, seconds: float = 10.0, mode: str = "eager") -> list[float]:
    """Milliseconds of a forward pass of each model on `images`, measured in turn, see `time_rounds`."""
    return typical(time_rounds(models, images, seconds, mode)).tolist()
