"""The flags of every command, without torch or timm, so that `--help` and a typo are answered at once."""

from .parts import DIGITS, BatchFlags, DataFlags, GeneralFlags, LatencyFlags, MachineFlags, ModelFlags

__all__ = ["DIGITS", "BatchFlags", "DataFlags", "GeneralFlags", "LatencyFlags", "MachineFlags", "ModelFlags"]
