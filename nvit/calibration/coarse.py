"""Calibration images seen through fewer pixels: a refit is fitted to the images that it sees, sharpness among the rest.

A model refitted on sharp images alone loses far more on blurred ones than it had to (benchmarks.accuracy.elsewhere).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

COARSEST = 3.5
"""A side is made up to so many times shorter, any factor as often as another."""


def coarser(batches: Iterable[Tensor], share: float, seed: int = 0) -> Iterator[Tensor]:
    """A share of the images made smaller, each by a factor of its own, and large again, bicubically; the others as they
    were. What happens to an image depends on the seed and on its place alone.

    Args:
        batches: images, each batch `(images, channels, height, width)`.
        share: in [0, 1].
    """
    draw = torch.Generator().manual_seed(seed)
    for images in batches:
        # Drawn on the host, so that a GPU never waits to be asked.
        chosen, factors = torch.rand(2, len(images), generator=draw, dtype=torch.float64).tolist()
        yield torch.stack(
            [
                _through(x, 1 + f * (COARSEST - 1)) if c < share else x
                for x, c, f in zip(images, chosen, factors, strict=True)
            ]
        )


def _through(image: Tensor, factor: float) -> Tensor:
    height, width = image.shape[-2:]
    few = (max(1, round(height / factor)), max(1, round(width / factor)))
    small = F.interpolate(image[None], size=few, mode="bicubic", antialias=True)
    return F.interpolate(small, size=(height, width), mode="bicubic")[0]
