"""How far a share of images may be off, as accuracy on a sample is."""

from __future__ import annotations

import math


def standard_error(percent: float, images: int) -> float:
    """Standard error, in points, of `percent` of so many images. Two right and two wrong ones are added, so that none
    right of a few images is not certainty (Agresti & Coull 1998)."""
    share = (percent / 100 * images + 2) / (images + 4)
    return 100 * math.sqrt(share * (1 - share) / (images + 4))


def top1(found: dict[str, float] | None, name: str = "top1") -> dict[str, float | None]:
    """What a result keeps of what `accuracy` found: `top1` with its standard error; None for both where it was not
    measured.

    Args:
        name: in place of `top1`, as `top1_before`.
    """
    keys = ("top1", "top1_se")
    return {f"{name}{key[4:]}": None if found is None else found[key] for key in keys}
