"""What the host may ask of a device."""

import torch


def reading_is_free(device: torch.device) -> bool:
    """Whether looking at a number there makes nobody wait."""
    return device.type == "cpu"
