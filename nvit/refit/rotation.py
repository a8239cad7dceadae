"""Bases of queries, keys and values in which a few dims carry the loss; the model's function stays.

Attention logits are products of queries and keys: `q -> R q`, `k -> R⁻ᵀ k` leaves them as they are, head by head, and
so does `v -> R v` with the last layer's columns times `R⁻¹`. The dims of every head come out in the order of what their
removal costs, so that a `v_dim` or `qk_dim` unit, one index in all heads, is dear in all of them or cheap in all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..calibration.capture import Place
from ..calibration.statistics import SiteStatistics
from ..layers import prunable_layers

_FLOOR = 1e-6
"""Of eigenvalues, in units of their mean: a direction never seen still has to be invertible."""


def balanced(covariance: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """The basis in which covariance and curvature are both diagonal and alike, as in balanced truncation.

    With `C` the activations' covariance and `G` their Gauss-Newton curvature, both `(..., d, d)`, fp64:
    `R C Rᵀ = R⁻ᵀ G R⁻¹`, diagonal, descending.
    Keeping the first dims is then best among all rank-r projections for the loss `tr(G · error covariance)`.

    Returns:
        `R` and its inverse.
    """

    def roots(m: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(m)
        floor = values.mean(-1, keepdim=True).clamp_min(1e-300) * _FLOOR
        root = torch.maximum(values, floor).sqrt()
        return (vectors * root[..., None, :]) @ vectors.mT, (vectors / root[..., None, :]) @ vectors.mT

    (c, c_inverse), (g, _) = roots(covariance), roots(curvature)
    _, s, vh = torch.linalg.svd(g @ c)
    s = s.clamp_min(s[..., :1] * 1e-12).sqrt()
    return s[..., :, None] * (vh @ c_inverse), (c @ vh.mT) / s[..., None, :]


@torch.no_grad()
def rotate_(model: nn.Module, statistics: Mapping[Place, SiteStatistics]) -> dict[str, str]:
    """Rotate queries, keys and values of a dense prepared model, in place; its statistics are turned alike.

    Returns:
        Layers and axes left as they are, with the reason.
    """
    left = {}
    for name, layer in prunable_layers(model).items():
        for basis in layer.bases():
            place = (name, basis.site)
            reason = "no statistics were gathered there" if place not in statistics else basis.refusal
            if reason is not None:
                left[f"{name}.{basis.axis}"] = reason
                continue
            s = statistics[place]
            second = s.covariance if basis.constant else s.xx / s.rows
            r, inverse = balanced(*(_heads(m, basis.heads, basis.dims) for m in (second, s.curvature)))
            layer.turn_(basis.axis, r, inverse)
            _turn_(s, r, inverse)
    return left


def _heads(m: Tensor, heads: int, dims: int) -> Tensor:
    """The diagonal blocks `(heads, dims, dims)` of a matrix over all heads' dims."""
    return m.view(heads, dims, heads, dims).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _turn_(s: SiteStatistics, r: Tensor, inverse: Tensor) -> None:
    big, back = torch.block_diag(*r), torch.block_diag(*inverse)
    s.x, s.xx, s.gg = big @ s.x, big @ s.xx @ big.T, back.T @ s.gg @ back
