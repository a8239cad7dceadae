"""Differences and ratios between two models on the same images, with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """A mean over images of `a - b`.

    Attributes:
        mean: in the unit of the inputs; a share for right-or-wrong answers, 100 times that in points of top-1.
        low, high: the central 95 % of the bootstrap's means.
        better: share of the bootstrap in which `a` is above `b`; draws count half.
    """

    mean: float
    low: float
    high: float
    better: float

    @property
    def significant(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(a: Sequence[float], b: Sequence[float], resamples: int = 10_000, seed: int = 0) -> Difference:
    """Bootstrap over images of the mean of `a - b` (Efron & Tibshirani 1993, percentile interval).

    The same images are drawn for both, so that what is hard for both cancels.

    Args:
        a, b: one value per image in the same order, `(images,)`: right or wrong, or a loss.

    Raises:
        ValueError: different numbers of images, or none.
    """
    a, b = _paired(a, b)
    difference, draws = a - b, np.random.default_rng(seed)
    means = np.array([difference[draws.integers(a.size, size=a.size)].mean() for _ in range(resamples)])
    low, high = np.quantile(means, (0.025, 0.975))
    return Difference(
        float(difference.mean()), float(low), float(high), float((means > 0).mean() + 0.5 * (means == 0).mean())
    )


def ratio_bootstrap(
    a: Sequence[float], b: Sequence[float], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of `a` over the mean of `b`, what is left of an accuracy, and the central 95 % of its bootstrap over
    images, the same ones drawn for both.

    Raises:
        ValueError: different numbers of images, or none; or `b` is right about none.
    """
    a, b = _paired(a, b)
    if not b.sum():
        raise ValueError("the mean below is 0: of a model that is never right nothing can be left")
    draws = np.random.default_rng(seed)
    chosen = (draws.integers(a.size, size=a.size) for _ in range(resamples))
    low, high = np.quantile([a[i].sum() / max(b[i].sum(), 1e-12) for i in chosen], (0.025, 0.975))
    return float(a.sum() / b.sum()), float(low), float(high)


def _paired(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"values of shapes {a.shape} and {b.shape}; expected one per image, the same images in both")
    return a, b


def kl(dense: Tensor, pruned: Tensor) -> Tensor:
    """KL divergence of the pruned model's answers from the dense one's, in nats `(images,)`, from logits of both."""
    return F.kl_div(pruned.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def bits(right: Tensor) -> str:
    """Right or wrong by image as hexadecimal digits, a bit an image, the first one highest."""
    whole = "".join(str(int(r)) for r in right).ljust(-(-len(right) // 4) * 4, "0")
    return f"{int(whole, 2):0{len(whole) // 4}x}"


def answered(digits: str, images: int) -> list[float]:
    """What `bits` wrote, of so many images."""
    return [float(b) for b in f"{int(digits, 16):0{4 * len(digits)}b}"[:images]]
