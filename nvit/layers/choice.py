"""Which of an op's two ways runs on a shape, our kernel or torch's own op: the faster one, measured at first use.

Measurements are of calls without gradients, as models are served; where gradients are wanted the kernels' own rule of
shapes decides alone (`nvit_kernels.functional.<op>_takes`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..utils.files import write_atomically

Way = Callable[..., Tensor]
Times = dict[str, float]
"""Milliseconds of `kernel` and of `torch`."""


class Choices:
    """Measurements by device and key, in memory and in a folder.

    Attributes:
        stopwatch: milliseconds of each of several ways on the same tensors; RuntimeError where one cannot be timed.
        file_of: the file that keeps what a device was measured with, of these versions of everything.
        kind: the type of device that has kernels to choose from.
    """

    def __init__(
        self,
        stopwatch: Callable[[Sequence[Way], Sequence[Tensor | None]], list[float]],
        file_of: Callable[[torch.device], Path],
        kind: str = "cuda",
    ) -> None:
        self.stopwatch, self.file_of, self.kind = stopwatch, file_of, kind
        self.known: dict[torch.device, dict[str, Times]] = {}
        self._faster: dict[tuple, bool] = {}

    def kernel_wins(self, op: str, kernel: Way, plain: Way, tensors: Sequence[Tensor | None]) -> bool:
        """Whether `kernel` is the faster way; where it cannot be measured now it counts as faster, and is asked again.

        Both are called with `tensors`, several times where this is their first meeting.
        """
        x = tensors[0]
        if x.device.type != self.kind or _differentiated(tensors):
            return True
        key = (op, x.device, _dtype(x), *(None if t is None else t.shape for t in tensors))
        found = self._faster.get(key)
        if found is None:
            if not _measurable(tensors):
                return True
            found = self._faster[key] = self._measured(key, kernel, plain, tensors)
        return found

    def _measured(self, key: tuple, kernel: Way, plain: Way, tensors: Sequence[Tensor | None]) -> bool:
        op, device, dtype, *shapes = key
        words = ("-" if shape is None else "x".join(map(str, shape)) for shape in shapes)
        name = " ".join([op, str(dtype).removeprefix("torch."), *words])
        known = self.of(device)
        if name not in known:
            try:
                both = self.stopwatch((kernel, plain), tensors)
            except RuntimeError:  # one of the two cannot be captured: nothing says that ours is faster
                return False
            known[name] = dict(zip(("kernel", "torch"), both, strict=True))
            self._keep(device)
        return known[name]["kernel"] < known[name]["torch"]

    def of(self, device: torch.device) -> dict[str, Times]:
        """What is known of a device: op, dtype and shapes of its tensors, and the milliseconds of both ways."""
        if device not in self.known:
            self.known[device] = _read(self.file_of(device))
        return self.known[device]

    def describe(self, device: torch.device) -> list[str]:
        """A line for each op: on how many shapes the kernel is faster, and by how much; then the file with them all."""
        by_op: dict[str, list[float]] = {}
        for name, times in self.of(device).items():
            by_op.setdefault(name.split()[0], []).append(times["torch"] / times["kernel"])
        lines = [
            f"{op}: kernel faster on {sum(r > 1 for r in ratios)} of {len(ratios)} shapes, torch / kernel "
            f"{min(ratios):.2f} to {max(ratios):.2f}"
            for op, ratios in sorted(by_op.items())
        ]
        return [*lines, f"measured in {self.file_of(device)}"] if lines else []

    def _keep(self, device: torch.device) -> None:
        """Write what is known, with what other processes wrote meanwhile; a folder that takes no files is let be."""
        file = self.file_of(device)
        self.known[device] = _read(file) | self.known[device]
        with suppress(OSError):
            write_atomically(file, (json.dumps(self.known[device], indent=1) + "\n").encode())


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype an op computes in: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _differentiated(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _measurable(tensors: Sequence[Tensor | None]) -> bool:
    """Whether calls would run now and for nobody else: no fake tensors, nobody who counts calls, no capture."""
    if not all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors):
        return False
    if _get_current_dispatch_mode() is not None:
        return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _read(file: Path) -> dict[str, Times]:
    """What a file keeps; nothing where it is not there or damaged, since it can be measured again."""
    try:
        raw = json.loads(file.read_text())
        return {str(name): {way: float(times[way]) for way in ("kernel", "torch")} for name, times in raw.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


_choices: Choices | None = None


def use(choices: Choices | None) -> Choices | None:
    """Let these decide from now on; returns who did before. None: kernels run wherever they take the shape."""
    global _choices
    before, _choices = _choices, choices
    return before


def used() -> Choices | None:
    """Who decides."""
    return _choices


@contextmanager
def using(choices: Choices | None):
    """Inside, these decide."""
    before = use(choices)
    try:
        yield choices
    finally:
        use(before)


def run(op: str, kernel: Way, plain: Way, *tensors: Tensor | None) -> Tensor:
    """`kernel` or `plain` on `tensors`, the first of which says where: whichever is faster.

    While torch compiles, torch's own: the compiler fuses them with what surrounds them, and nothing can be measured.
    """
    if _choices is None:
        wins = True
    elif torch.compiler.is_compiling():
        wins = tensors[0].device.type != _choices.kind
    else:
        wins = _choices.kernel_wins(op, kernel, plain, tensors)
    return kernel(*tensors) if wins else plain(*tensors)
