"""What every launcher needs: which device, precision and units; when a call must stay one operator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from triton import knobs

INTERPRET = bool(knobs.runtime.interpret)  # read once: it must be set before a kernel is imported anyway
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}  # said aloud, since Triton's default is about to change
HERE = contextlib.nullcontext()
MOST_PLANS = 1024


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that holds `n`, at least `least` (a `tl.dot` operand needs 16)."""
    return max(least, 1 << (n - 1).bit_length())


def matmul_precision() -> str:
    """`tl.dot` precision for float32 operands: what torch is set to, so that both paths agree."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Context in which Triton launches on the device that holds `x`; costs next to nothing where it is current."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return HERE
    return torch.cuda.device(x.device)


def stays_one_operator(x: Tensor, w: Tensor) -> bool:
    """Whether a call must reach torch as one registered operator, and not run as Python and launches.

    So it is while torch compiles or exports, under any dispatch mode (fake tensors, counting, selective checkpointing),
    and for tensors of another class than torch's own. What the operator costs the host, five times the plain path, does
    not matter there.
    """
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or type(w) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def differentiated_once(backward: Callable) -> Callable:
    """`once_differentiable`, which refuses a second derivative, without its cost where nobody can ask for one."""
    guarded = once_differentiable(backward)

    def run(ctx, *grads):
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run


def describe(*tensors: Tensor | None) -> tuple:
    """All of tensors that a launch depends on besides their memory: the key of what is worked out once for them."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])


def remember(plans: dict, key: tuple, plan):
    """Keep `plan` under `key`; past `MOST_PLANS` forget the others. Returns it."""
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def check_list(index: Tensor | None, width: int, device: torch.device) -> None:
    """Raise `ValueError` unless kept units, where some are listed, are of this width and on this device."""
    if index is None:
        return
    if index.numel() != width:
        raise ValueError(f"kept units are listed for a width of {index.numel()}, but the tensor has {width} there")
    if index.device != device:
        raise ValueError(f"kept units are listed on {index.device}, but the tensor is on {device}; move them with .to")


def eighths(name: str, *numbers: int) -> tuple[int, ...]:
    """Each number divided by 8, for kernels that multiply by 8 again and so keep wide loads.

    Raises:
        ValueError: a number is no multiple of 8.
    """
    odd = [n for n in numbers if n % 8]
    if odd:
        raise ValueError(f"{name} must be multiples of 8 for the fused kernels, got {odd}; use the reference instead")
    return tuple(n // 8 for n in numbers)
