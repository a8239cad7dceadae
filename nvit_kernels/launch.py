"""What every launcher needs: is the interpreter on, which matmul precision, the right device, widths of eights."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from triton import knobs

INTERPRET = bool(knobs.runtime.interpret)  # read once: it must be set before a kernel is imported anyway
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}  # said aloud, since Triton's default is about to change


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that holds `n`, at least `least` (a `tl.dot` operand needs 16)."""
    return max(least, 1 << (n - 1).bit_length())


def matmul_precision() -> str:
    """`tl.dot` precision for float32 operands: what torch is set to, so that both paths agree."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def on_device(x: Tensor):
    """Context in which Triton launches on the device that holds `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


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
