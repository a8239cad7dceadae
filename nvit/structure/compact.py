"""Cut weights: narrower copies of a model that compute what the masked one does."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .. import adapters
from ..spec import Group
from .masks import WeightMasks, check_masks, weight_masks


def cut(params: Mapping[str, Tensor], weights: WeightMasks) -> dict[str, Tensor]:
    """Copies of the parameters without what was pruned: shapes shrink."""
    out = {}
    for name, p in params.items():
        t = p.detach()
        for dim, keep in enumerate(weights.get(name, ())):
            if keep is not None:
                t = t.index_select(dim, keep.nonzero().squeeze(1).to(t.device))
        out[name] = t.clone() if t.data_ptr() == p.data_ptr() else t.contiguous()
    return out


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters are on the meta device: its structure, no memory."""
    memo = {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo=memo)


def compact(
    model: nn.Module, groups: Sequence[Group], masks: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A narrower copy of a prepared model that computes what the masked one does.

    Args:
        weights: to cut instead of the model's own, as its moving average; only shapes are read from the model then.
    """
    check_masks(groups, masks)
    params = dict(model.named_parameters())
    weights = cut(params if weights is None else weights, weight_masks(params, groups, masks))
    twin = meta_copy(model)
    twin.sparse24 = ()  # neighbours are others now
    twin.masks = None
    return adapters.find(twin).resize(twin, weights, masks)
