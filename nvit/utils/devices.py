"""What the host may ask of a device."""

import torch
from torch import Tensor


def reading_is_free(device: torch.device) -> bool:
    """Whether looking at a number there makes nobody wait."""
    return device.type == "cpu"


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, on its way there while the host goes on: CUDA takes pinned memory without waiting."""
    if tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=device.type != "mps")
