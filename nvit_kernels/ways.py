"""Which of an MLP's ways runs on a shape: measured once on the device, kept, and there to be read.

`whole`: the vendor's products over all hidden units, our passes around them; pruned units are zeroed there. Never waits
for the device. `gather`: the same over kept weights that were copied out; reads the count on the host once per call.
`fused`: our products, which read kept lists on the device and take GELU into their epilogue; never waits either.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nvit_kernels.tuning import about, capability, device_milliseconds

WAYS = ("whole", "gather", "fused")
OPS = ("mlp", "mlp_backward", "swiglu", "swiglu_backward")  # without gradients, and a step with them
HOPPER = 90
COVERS = 64  # of device work before a timed step, which costs the host more than a launch
_measured: dict[tuple, dict[str, float]] = {}
_preferred: dict[str, str] = {}


def measured() -> dict[tuple, dict[str, float]]:
    """Milliseconds of each way by (op, GPU, dtype, tokens about, in width, hidden width, listed), of shapes met.

    An op's name ends in `_backward` where forward and backward were timed together. Tokens are to the next power of
    two; `listed` says whether some units may be pruned.
    """
    return {key: dict(times) for key, times in _measured.items()}


def prefer(op: str, way: str | None) -> None:
    """Make `op`, one of `OPS`, take `way` on every shape; None measures again.

    Raises:
        ValueError: no such way.
    """
    if way not in (None, *WAYS):
        raise ValueError(f"{op} has no way '{way}'; choose one of {', '.join(WAYS)}, or None to measure")
    _preferred.pop(op, None)
    if way is not None:
        _preferred[op] = way


def offered(x: Tensor, listed: bool) -> tuple[str, ...]:
    """The ways worth measuring on the device of x; `listed`: some units may be pruned.

    `fused` lost on every shape measured on Hopper (docs/kernels/mlp.md), so there it runs only where it is preferred.
    """
    ways = ("whole", "gather") if listed else ("whole",)
    return ways if x.is_cuda and capability(x) >= HOPPER else (*ways, "fused")


def without_waiting(op: str, x: Tensor, listed: bool) -> str:
    """The way that torch.compile and export get: no host read, and a matter of the device alone."""
    if (way := _preferred.get(op)) in ("whole", "fused"):
        return way
    return "fused" if listed and "fused" in offered(x, listed) else "whole"


def choose(
    remembered: dict[str, str], op: str, x: Tensor, hidden: int, listed: bool, run: Callable[[str], object]
) -> str:
    """The way `op` takes on x `(..., in)`.

    Args:
        remembered: ways by op, for tensors of one description; filled here, so that the next call costs nothing.
        run: does all that is to be timed of a way, and changes nothing.
    """
    way = _preferred.get(op) or remembered.get(op)
    if way in (None, "gather") and x.is_cuda and torch.cuda.is_current_stream_capturing():
        return without_waiting(op, x, listed)  # a captured graph can neither be timed nor read the count on the host
    if way is None:
        way = remembered[op] = _choose(op, x, hidden, listed, run)
    return way


def _choose(op: str, x: Tensor, hidden: int, listed: bool, run: Callable[[str], object]) -> str:
    ways = offered(x, listed)
    if not x.is_cuda or len(ways) == 1:
        return without_waiting(op, x, listed)
    width = x.shape[-1]
    key = (op, torch.cuda.get_device_name(x.device), str(x.dtype), about(x.numel() // width), width, hidden, listed)
    if key not in _measured:
        _measured[key] = {way: device_milliseconds(lambda way=way: run(way), x.device, covers=COVERS) for way in ways}
    return min(_measured[key], key=_measured[key].__getitem__)


def step(call: Callable[..., Tensor], tensors: tuple[Tensor | None, ...]) -> None:
    """`call` on copies of the tensors that share their memory, with gradients where they are on; to be timed."""
    saves = torch.is_grad_enabled()
    leaves = [t if t is None else t.detach().requires_grad_(saves) for t in tensors]
    out = call(*leaves)
    if saves:
        torch.autograd.grad(out, [t for t in leaves if t is not None], torch.ones_like(out))
