"""Which two of each four weights stay, by the squared error of a linear layer's outputs, and what their values become.

With `H` the second moment of a layer's inputs and `w` a row of its weight, outputs change by `δ H δᵀ` when `w` changes
by `δ`. Optimal brain surgeon (Hassibi & Stork 1993): zeroing the weights `P` costs at least `w_P (H⁻¹_PP)⁻¹ w_Pᵀ`, when
all other weights make good what they can. SparseGPT (arXiv:2301.00774) goes through the columns from left to right, so
that all rows share one factorisation of `H⁻¹` of the columns that are left; so does `best_pairs`, but it goes by groups
of four, weighs all six pairs exactly, and lets all four weights of the group change.
"""

from __future__ import annotations

import torch
from torch import Tensor

GONE = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""The six pairs of a group that can be zeroed."""

_BLOCK = 32
"""Columns whose changes are gathered before the columns behind them are touched."""

_CHUNK = 2**24
"""Elements of the systems solved at once."""


def best_pairs(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Zero two of each four neighbours in a row of `weight`, from left to right, each time the pair whose loss the
    weights that are not decided yet can make good best.

    Args:
        weight: `(out, in)` fp64, `in` a multiple of 4; the best weight if all stayed.
        hessian: `(in, in)` fp64, positive definite.

    Returns:
        The changed weight, zeros where two of four have left, and the bool mask of what stays.

    Raises:
        torch.linalg.LinAlgError: the Hessian is not positive definite; it needs damping.
    """
    w, columns = weight.clone(), weight.shape[1]
    # Rows j and on of the upper factor: the inverse of H without the columns before j is u[j:, j:]ᵀ u[j:, j:].
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    pairs = torch.tensor(GONE, device=w.device)
    mask = torch.ones_like(w, dtype=torch.bool)
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        changes = w.new_zeros(len(w), end - begin)
        for j in range(begin, end, 4):
            here = slice(j, j + 4)
            corner = u[here, here]
            best, errors = _cheapest(w[:, here], corner.T @ corner, pairs)
            mask[:, here].scatter_(1, best, False)
            changes[:, j - begin : j - begin + 4] = errors @ corner.T
            w[:, j:end] -= changes[:, j - begin : j - begin + 4] @ u[here, j:end]
        w[:, end:] -= changes @ u[begin:end, end:]
    return w * mask, mask


def _cheapest(w: Tensor, inverse: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of a group `(out, 4)` the pair `(out, 2)` that is cheapest to zero, and `w_P (H⁻¹_PP)⁻¹` at its
    places, zeros elsewhere `(out, 4)`."""
    blocks = inverse[pairs[:, :, None], pairs[:, None, :]]
    candidates = w[:, pairs]
    scaled = (candidates[:, :, None, :] @ torch.linalg.inv(blocks)).squeeze(2)
    best = (scaled * candidates).sum(2).argmin(1)
    errors = scaled.gather(1, best[:, None, None].expand(-1, 1, 2)).squeeze(1)
    return pairs[best], torch.zeros_like(w).scatter_(1, pairs[best], errors)


def best_values(hessian: Tensor, cross: Tensor, mask: Tensor) -> Tensor:
    """The weight under a mask that minimises `w H wᵀ - 2 w cᵀ`, row by row, with all that stays free again.

    Args:
        hessian: `(in, in)` fp64, positive definite.
        cross: `(out, in)` fp64, the rows `c`.
        mask: bool `(out, in)`, as many True in every row.
    """
    places = mask.nonzero()[:, 1].view(len(mask), -1)
    values = torch.zeros_like(cross)
    step = max(1, _CHUNK // max(1, places.shape[1] ** 2))
    for at in range(0, len(mask), step):
        p = places[at : at + step]
        factor = torch.linalg.cholesky(hessian[p[:, :, None], p[:, None, :]])
        c = cross[at : at + step].gather(1, p)
        values[at : at + step].scatter_(1, p, torch.cholesky_solve(c[:, :, None], factor).squeeze(2))
    return values
