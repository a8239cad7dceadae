"""Second moments gathered batch by batch, and the ridge change of a linear layer that they determine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = tuple(10.0 ** (k / 2) for k in range(-6, 5))
"""Strengths to choose from, in units of the inputs' mean variance. The least bounds a change by 16 residuals per
standard deviation of the inputs, also where held-back rows are the same as those fitted."""

_VARIANCE = 1e-4
"""Of the inputs' mean square, the least variance that is told from rounding."""

_NOTHING = 1e-10
"""Residual energy as a share of the targets' below which there is nothing to refit but rounding."""


@dataclass
class Moments:
    """Weighted sums over rows of inputs `x` `(rows, in)` and of what a layer lacks, `r` `(rows, out)`. fp64.

    Attributes:
        weight: Σ w. `x`, `r`: Σ w·x, Σ w·r. `xx`, `rx`: Σ w·x xᵀ `(in, in)`, Σ w·r xᵀ `(out, in)`.
        rr, tt: Σ w·r² and Σ w·t² by output, `t` the layer's targets.
    """

    weight: Tensor
    x: Tensor
    r: Tensor
    xx: Tensor
    rx: Tensor
    rr: Tensor
    tt: Tensor

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> Moments:
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)  # noqa: E731
        return cls(
            zeros(),
            zeros(inputs),
            zeros(outputs),
            zeros(inputs, inputs),
            zeros(outputs, inputs),
            zeros(outputs),
            zeros(outputs),
        )

    def add(self, x: Tensor, r: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """Add rows: products in fp32 (fp64 for fp64 rows), sums over batches in fp64.

        Args:
            weights: `(rows,)`, at least 0; 1 where not given.
        """
        x, r, targets = (t if t.dtype == torch.float64 else t.float() for t in (x, r, targets))
        w = x.new_ones(len(x)) if weights is None else weights.to(x.dtype)
        xw = x * w[:, None]
        self.weight += w.double().sum()
        self.x += (w @ x).double()
        self.r += (w @ r).double()
        self.xx += (xw.T @ x).double()
        self.rx += (r.T @ xw).double()
        self.rr += (w @ r.square()).double()
        self.tt += (w @ targets.square()).double()

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def about(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments about the points `x` and `r`: `(in, in)`, `(out, in)`, `(out,)`, per unit of weight."""
        mx, mr = self.x / self.weight, self.r / self.weight
        xx = self.xx / self.weight - torch.outer(mx, x) - torch.outer(x, mx) + torch.outer(x, x)
        rx = self.rx / self.weight - torch.outer(mr, x) - torch.outer(r, mx) + torch.outer(r, x)
        return xx, rx, self.rr / self.weight - 2 * mr * r + r.square()

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`about` the means, and the means of `x` and `r`."""
        mx, mr = self.x / self.weight, self.r / self.weight
        return (*self.about(mx, mr), mx, mr)


@dataclass(frozen=True)
class Change:
    """What to add to a layer's weight `(out, in)` and bias `(out,)`, and the squared error per row, held back, before
    and after."""

    weight: Tensor
    bias: Tensor
    before: float
    after: float


def ridge(
    train: Moments, held: Moments, *, constant: bool = True, shared: bool = False, ridges: Sequence[float] = RIDGES
) -> Change | None:
    """The change of a linear layer that predicts what it lacks: least squares with a penalty on the change.

    Minimises Σ w·|r − D x − d|² + λ·|D|² on `train` for every λ at once through the eigenvectors of the inputs'
    covariance; each output takes the λ, no change among them, that leaves the least error on `held`. The change
    returned is solved at these λ from both together.

    Args:
        constant: whether the layer has a bias to take `d`; 0 otherwise.
        shared: all outputs take the same λ.

    Returns:
        None where the layer lacks nothing, or no change is better than none.
    """
    if float(held.weight) == 0 or float((train.rr + held.rr).sum()) <= _NOTHING * float((train.tt + held.tt).sum()):
        return None
    if not len(train.x):
        return _shift(train, held) if constant else None
    zero_x, zero_r = torch.zeros_like(train.x), torch.zeros_like(train.r)
    mx, mr = (train.x / train.weight, train.r / train.weight) if constant else (zero_x, zero_r)
    (xx, rx, _), (hxx, hrx, hrr) = train.about(mx, mr), held.about(mx, mr)
    values, vectors = torch.linalg.eigh(xx)
    scale = max(float(values.mean()), _VARIANCE * float((train.xx.diagonal() / train.weight).mean()))
    if not scale > 0:
        return None
    values = values.clamp_min(0)
    mine, theirs, spread = rx @ vectors, hrx @ vectors, vectors.T @ hxx @ vectors
    none = held.rr / held.weight
    best, chosen = none.clone(), torch.full_like(none, float("inf"))
    for strength in ridges:
        d = mine / (values + strength * scale)
        error = hrr - 2 * (d * theirs).sum(1) + ((d @ spread) * d).sum(1)
        better = (error.sum() < best.sum()).expand_as(best) if shared else error < best
        best, chosen = torch.where(better, error, best), torch.where(better, strength, chosen)
    if bool(chosen.isinf().all()):
        return None
    both = train + held
    mx, mr = (both.x / both.weight, both.r / both.weight) if constant else (zero_x, zero_r)
    xx, rx, _ = both.about(mx, mr)
    values, vectors = torch.linalg.eigh(xx)
    d = (rx @ vectors) / (values.clamp_min(0) + chosen[:, None] * scale) @ vectors.T
    shift = torch.where(chosen.isinf(), 0.0, mr - d @ mx) if constant else zero_r
    return Change(d, shift, float(none.sum()), float(best.sum()))


def _shift(train: Moments, held: Moments) -> Change | None:
    """The change of a layer that is left without inputs: the mean of what it lacks, of the outputs where that of
    `train` is better than none on `held`."""
    _, _, before = held.about(held.x, torch.zeros_like(held.r))
    _, _, after = held.about(held.x, train.r / train.weight)
    better, both = after < before, train + held
    if not bool(better.any()):
        return None
    shift = torch.where(better, both.r / both.weight, 0.0)
    return Change(both.rx, shift, float(before.sum()), float(torch.minimum(before, after).sum()))
