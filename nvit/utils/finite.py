"""Whether numbers stay finite, found out where they are: off the CPU nobody waits until somebody looks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import devices


class Finite:
    """Which of many numbers was the first that was not finite.

    Args:
        device: of the numbers.
        say: the message for the first, from its place in the order and its value.

    Attributes:
        at: its place, int64 scalar on the device; -1 while there is none.
        value: itself, fp32 scalar.
    """

    def __init__(self, device: torch.device, say: Callable[[int, float], str]) -> None:
        self.say = say
        self.at = torch.full((), -1, dtype=torch.int64, device=device)
        self.value = torch.zeros((), device=device)

    @torch.no_grad()
    def add(self, place: int | Tensor, value: Tensor, also: Tensor | None = None) -> None:
        """Take a scalar in; it can be captured in a CUDA graph.

        Args:
            place: in the order; where it changes from replay to replay, a scalar on the device.
            also: another scalar, with which the first is bad too.
        """
        good = torch.isfinite(value) if also is None else torch.isfinite(value) & torch.isfinite(also)
        first = ~good & (self.at < 0)
        self.at.copy_(torch.where(first, place, self.at))
        self.value.copy_(torch.where(first, value, self.value))

    def check(self) -> None:
        """Look, which waits for the device.

        Raises:
            FloatingPointError: a number was not finite.
        """
        if (at := int(self.at)) >= 0:
            raise FloatingPointError(self.say(at, float(self.value)))

    def check_if_free(self) -> None:
        """`check` where looking makes nobody wait."""
        if devices.reading_is_free(self.at.device):
            self.check()
