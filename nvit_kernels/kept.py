"""Which units of one width are kept, in a form whose shape never changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """The kept units of one width, on the device, with shapes that do not depend on how many are kept.

    A kernel reads `count` on the device and leaves early, so new masks mean no new shapes: nothing is
    recompiled, re-allocated or read back to the host.

    Attributes:
        index: int32 `(width,)`, a permutation: the kept units ascending, then the pruned ones ascending.
        count: int32 `(1,)`, how many of `index` are kept.
        mask: bool `(width,)`, True stays.
    """

    index: Tensor
    count: Tensor
    mask: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> Kept:
        """Kept units of `mask`, bool `(width,)`, on its device. The mask is copied."""
        check_mask(mask)
        width = mask.numel()
        index = torch.empty(width, dtype=torch.int32, device=mask.device)
        count = torch.empty(1, dtype=torch.int32, device=mask.device)
        return cls(index, count, torch.empty_like(mask)).update_(mask)

    @classmethod
    def all(cls, width: int, device: torch.device | str = "cpu") -> Kept:
        """Every one of `width` units kept."""
        return cls.from_mask(torch.ones(width, dtype=torch.bool, device=device))

    def update_(self, mask: Tensor) -> Kept:
        """Take over a new mask in place, without waiting for the device.

        Raises:
            ValueError: `mask` is not bool, or has another width.
        """
        check_mask(mask, self.width)
        self.mask.copy_(mask)
        self.index.copy_(torch.argsort((~self.mask).to(torch.uint8), stable=True))
        self.count.copy_(self.mask.sum().reshape(1))
        return self

    @property
    def width(self) -> int:
        """The dense width: kept and pruned units together."""
        return self.index.numel()

    def indices(self) -> Tensor:
        """The kept indices, int64 `(count,)`. Reads `count` on the host, so it waits for the device."""
        return self.index[: int(self.count)].long()

    def to(self, device: torch.device | str) -> Kept:
        """A copy on `device`, or this object when it is there already."""
        if self.index.device == torch.device(device):
            return self
        return Kept(self.index.to(device), self.count.to(device), self.mask.to(device))


def check_mask(mask: Tensor, width: int | None = None) -> None:
    """Raise `ValueError` unless `mask` is a bool vector, of `width` units where that is given."""
    if mask.dtype != torch.bool or mask.dim() != 1:
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, expected a bool vector, True for units that stay")
    if width is not None and mask.numel() != width:
        raise ValueError(f"mask has {mask.numel()} entries but this width has {width} units")
