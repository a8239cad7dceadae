"""The only stopwatch in nvit."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..utils.memory import keep_freed_memory


def device_name(device: torch.device | str) -> str:
    """The processor's or GPU's own name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")] if cpuinfo.exists() else []
    return models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Setting:
    """What a latency was measured on; a table speaks for no other setting."""

    device: str
    dtype: str
    batch_size: int
    tokens: int
    threads: int
    versions: str


def current_setting(device: torch.device | str, dtype: torch.dtype, batch_size: int, tokens: int) -> Setting:
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 0
    return Setting(
        device_name(device),
        str(dtype).removeprefix("torch."),
        batch_size,
        tokens,
        threads,
        f"torch {torch.__version__}",
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "cpu" and torch.get_num_threads() == 1:
        # A lone thread's own time is its latency on an idle core, whatever else the machine does meanwhile.
        return time.thread_time()
    return time.perf_counter()


def time_each(calls: Sequence[Callable[[], object]], device: torch.device | str, seconds: float) -> list[float]:
    """Median milliseconds of each call, all of them in turn, round after round, so that drift meets all alike.

    The first round is a warm-up. At least one more follows, then as many as fit in `seconds`.
    """
    device = torch.device(device)
    if device.type == "cpu":
        keep_freed_memory(True)
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 2 or time.perf_counter() < end:
        row = []
        for call in calls:
            start = _now(device)
            call()
            row.append((_now(device) - start) * 1e3)
        rounds.append(row)
    return np.median(rounds[1:], axis=0).tolist()


@torch.inference_mode()
def time_models(models: Sequence[nn.Module], images: Tensor, seconds: float = 10.0) -> list[float]:
    """Median milliseconds of a forward pass of each model on `images`, measured in turn."""
    was = [m.training for m in models]
    times = time_each([partial(m.eval(), images) for m in models], images.device, seconds)
    for m, training in zip(models, was, strict=True):
        m.train(training)
    return times
