"""Which of an op's two ways runs on a shape: measured once on the device, kept, and there to be read.

`fused` reads kept lists on the device: it never waits for it and can be captured in a CUDA graph. `gather` copies the
kept weights out and calls the vendor's matmul: it reads the count on the host once per call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WAYS = ("fused", "gather")
_measured: dict[tuple, dict[str, float]] = {}
_preferred: dict[str, str] = {}


def measured() -> dict[tuple, dict[str, float]]:
    """Milliseconds of each way by (op, GPU, dtype, tokens, in width, hidden width), for every shape met so far."""
    return {key: dict(times) for key, times in _measured.items()}


def prefer(op: str, way: str | None) -> None:
    """Make `op` (mlp, mlp_backward, swiglu, swiglu_backward) take `way` on every shape; None measures again.

    Raises:
        ValueError: no such way.
    """
    if way not in (None, *WAYS):
        raise ValueError(f"{op} has no way '{way}'; choose one of {', '.join(WAYS)}, or None to measure")
    _preferred.pop(op, None)
    if way is not None:
        _preferred[op] = way


def choose(op: str, x: Tensor, hidden: int, run: Callable[[str], None]) -> str:
    """The way `op` takes on x `(tokens, in)`; `run(way)` runs it and may be called often, into the same outputs."""
    if op in _preferred:
        return _preferred[op]
    if not x.is_cuda:
        return "fused"
    if torch.cuda.is_current_stream_capturing():  # a captured graph cannot read the count on the host
        return "fused"
    key = (op, torch.cuda.get_device_name(x.device), str(x.dtype), *x.shape, hidden)
    if key not in _measured:
        _measured[key] = {way: _milliseconds(lambda way=way: run(way)) for way in WAYS}
    return min(WAYS, key=_measured[key].__getitem__)


def _milliseconds(call: Callable[[], None], repeats: int = 10) -> float:
    """Median of single timed calls, after three that warm up and autotune."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]
