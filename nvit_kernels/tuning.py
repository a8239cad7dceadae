"""Which config of a kernel runs, and how long calls take on a device: measured once a kind of call, then remembered."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from nvit_kernels.configs import CONFIGS, INTERPRETED, SHARED_BYTES, fitting
from nvit_kernels.launch import FUSED_MULTIPLY_ADD, INTERPRET

COVER_BYTES = 64 << 20  # more than an L2 cache holds
Grid = Callable[[dict[str, object]], tuple[int, ...]]


def device_milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 7, covers: int = 8) -> float:
    """Median device time of single calls that find cold caches, after two that compile and warm up.

    Work queued before each call, `covers` passes over 64 MB, keeps the device busy while the host enqueues the call, so
    that the host's time does not count.
    """
    cover = torch.empty(COVER_BYTES, dtype=torch.uint8, device=device)
    for _ in range(2):
        call()
    spans = []
    for _ in range(repeats):
        for _ in range(covers):
            cover.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize(device)
    return sorted(start.elapsed_time(end) for start, end in spans)[repeats // 2]


def about(n: int) -> int:
    """`n` to the next power of two: a choice made at one number of tokens serves those near it."""
    return 1 << max(0, n - 1).bit_length()


def capability(x: Tensor) -> int:
    """Compute capability of the device of `x`, as 80 or 90; the least there is where that is no GPU."""
    if not x.is_cuda:
        return min(SHARED_BYTES)
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


class Launch:
    """A kernel and all of a call that holds no memory: called with the rest, in the kernel's order.

    A kernel names its pointers first, with whatever else changes from call to call, and then what follows from shapes.
    The latter is given here by name and bound once: passing two dozen names anew costs the host more than a launch.

    Args:
        grid: programs along each axis.
        fixed: arguments that follow from shapes, constants and options of the compiler, by name.
    """

    __slots__ = ("bound", "kernel", "options")

    def __init__(self, kernel: object, grid: tuple[int, ...], fixed: dict[str, object]):
        names = list(kernel.arg_names)
        last = [name for name in names if name in fixed]
        assert names[len(names) - len(last) :] == last, f"{kernel} takes {names}; {last} must be its last"
        self.kernel, self.bound = kernel, tuple(fixed[name] for name in last)
        options = {name: value for name, value in fixed.items() if name not in names}
        self.options = {**options, **FUSED_MULTIPLY_ADD, "grid": grid, "warmup": False}

    def __call__(self, *memory: object) -> None:
        self.kernel.run(*memory, *self.bound, **self.options)  # where `kernel[grid](…)` ends, after two more copies


class Tuned:
    """A kernel with the configs of `name`, of which each kind of call gets the one that a GPU runs fastest.

    They are measured at the first call of a kind, some ten launches each, and the choice is remembered while the
    process lives. Where nothing can be measured (one config fits, no GPU, a graph being captured) the first that fits
    runs.
    """

    def __init__(self, name: str, kernel: object):
        self.name, self.kernel = name, kernel
        self.configs = [INTERPRETED[name]] if INTERPRET else [c for held in CONFIGS[name].values() for c in held]
        self.best: dict[tuple, triton.Config] = {}

    def prepare(self, kind: tuple, like: Tensor, grid: Grid, fixed: dict[str, object], memory: tuple) -> Launch:
        """The launch for calls like this one.

        Args:
            kind: what the choice of a config depends on: widths, about how many tokens, which operands there are.
            like: an operand, on the device that will run.
            grid: the programs of a launch, from its block sizes by name.
            fixed: arguments that hold no memory, by name, constants included.
            memory: the others, in the kernel's order; launched on several times where configs are measured.
        """
        arguments = {**dict(zip(self.kernel.arg_names, memory, strict=False)), **fixed}
        left = self.configs if INTERPRET else fitting(self.name, capability(like), arguments, like.element_size())
        if len(left) > 1 and like.is_cuda:
            kind = (*kind, like.dtype, like.get_device())
            if kind not in self.best and not torch.cuda.is_current_stream_capturing():
                self.best[kind] = min(
                    left, key=lambda c: self._milliseconds(self._launch(c, grid, fixed), like, memory)
                )
            return self._launch(self.best.get(kind, left[0]), grid, fixed)
        return self._launch(left[0], grid, fixed)

    def _launch(self, config: triton.Config, grid: Grid, fixed: dict[str, object]) -> Launch:
        options = {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}
        return Launch(self.kernel, grid({**fixed, **options}), {**fixed, **options})

    @staticmethod
    def _milliseconds(launch: Launch, like: Tensor, memory: tuple) -> float:
        try:
            return device_milliseconds(lambda: launch(*memory), like.device)
        except (OutOfResources, PTXASError):
            return float("inf")
