"""Whether a written file computes what the model does, in the file's own runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..utils.files import short

BATCHES = (1, 3)
"""Images a batch that a file for any batch is checked at."""

FULL, HALF = 1e-4, 1e-2
"""How far logits may be off, as a share of the largest: in fp32, and where numbers have 16 bits."""


def difference(
    name: str, run: Callable[[Tensor], Tensor], model: Callable[[Tensor], Tensor], batches: Sequence[Tensor]
) -> float:
    """The largest difference of outputs over `batches`, as a share of the largest output.

    Raises:
        ValueError: the file does not run, or its outputs are others; says at which batch.
    """
    worst = 0.0
    for images in batches:
        with torch.no_grad():
            expected = model(images)
        try:
            found = run(images)
        except Exception as e:  # a runtime's own, whatever it is
            raise ValueError(
                f"{name} does not run on {len(images)} images: {short(e, 200)}; nothing is written"
            ) from None
        if found.shape != expected.shape:
            raise ValueError(
                f"{name} gives outputs of {tuple(found.shape)} for {len(images)} images, the model "
                f"{tuple(expected.shape)}; nothing is written"
            )
        found, expected = found.double(), expected.double()
        off = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        allowed = FULL if images.dtype == torch.float32 else HALF
        if not off <= allowed:  # a NaN as well
            raise ValueError(
                f"{name} computes something else on {len(images)} images: logits are off by {off:.1e} of the largest, "
                f"{allowed:.0e} is allowed; nothing is written. Try another --opset or format, or --static-batch"
            )
        worst = max(worst, off)
    return worst
