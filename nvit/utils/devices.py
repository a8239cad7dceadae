"""What the host may ask of a device."""

from collections.abc import Sequence

import torch
from torch import Tensor

PORTION = 16
"""Images that a CPU takes at once: of larger batches what a block computes leaves its caches, and glibc gives tensors
from 32 MiB on back to the system every time (DeiT-Ti, 64 images: a quarter slower)."""


def reading_is_free(device: torch.device) -> bool:
    """Whether looking at a number there makes nobody wait."""
    return device.type == "cpu"


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, on its way there while the host goes on: CUDA takes pinned memory without waiting."""
    if tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=device.type != "mps")


def portions(images: Tensor, device: torch.device) -> Sequence[Tensor]:
    """A batch as a device takes it best, one after the other and all about as large: at once, but on a CPU."""
    return images.chunk(-(-len(images) // PORTION)) if device.type == "cpu" and len(images) else (images,)
