"""The gradient of every unit's gate, read from weights and their gradients (arXiv:2110.04869, Eq. 4)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..layers import functional
from ..spec import Group, Slice


def gate_gradients(
    groups: Sequence[Group],
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    slices: Callable[[Group], Sequence[Slice]] = lambda g: g.scored_slices,
) -> dict[str, Tensor]:
    """Gradient of the loss with respect to every unit's gate, from weights (arXiv:2110.04869, Eq. 4).

    Parameters without a gradient (frozen, or unused in the loss) do not count.

    Args:
        params: parameters by name, unsharded.
        grads: loss gradients with the same shapes, mean over the batch.
        slices: which slices of a group count.

    Returns:
        By group, `(group.size,)` in loss, fp32 (fp64 for fp64 parameters).

    Raises:
        ValueError: no slice of a group has a gradient.
    """
    counted = {g.name: [s for s in slices(g) if s.name in grads] for g in groups}
    if silent := next((g for g in groups if not counted[g.name]), None):
        names = ", ".join(dict.fromkeys(s.name for s in slices(silent)))
        raise ValueError(
            f"{silent.name}: nothing scores it, no gradient reached {names}; train them, or leave the group alone with "
            "freeze"
        )
    sizes = [g.size for g in groups]
    starts = dict(zip((g.name for g in groups), [0, *itertools.accumulate(sizes)], strict=False))
    every = [(s.name, *(s.rows or (0, None)), s.view, s.axis, starts[g.name]) for g in groups for s in counted[g.name]]
    # Fused, it holds every parameter at once: not where they are gathered one at a time.
    if isinstance(params, dict) and (fused := functional.group_dot(params, grads, every)) is not None:
        return dict(zip(starts, fused.split(sizes), strict=True))
    totals, last = {}, (None, None, None)
    for g in groups:
        total = None
        for s in counted[g.name]:
            # Neighbouring groups read the same rows of the same parameter (heads and v_dim share proj).
            if last[:2] != (s.name, s.rows):
                span = slice(None) if s.rows is None else slice(*s.rows)
                last = (s.name, s.rows, wide(params[s.name][span]) * wide(grads[s.name][span]))
            part = sum_but(last[2].reshape(s.view), s.axis)
            total = part if total is None else total.add_(part)
        totals[g.name] = total
    return totals


def wide(t: Tensor) -> Tensor:
    return t.detach() if t.dtype == torch.float64 else t.detach().float()


def sum_but(t: Tensor, axis: int) -> Tensor:
    other = [d for d in range(t.dim()) if d != axis]
    return t.sum(other) if other else t.clone()


def unit_saliency(group: Group, params: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> Tensor:
    """Squared first-order loss change from removing each unit of `group` (arXiv:2110.04869, Eq. 6).

    A unit owns one index in several parameters. Their `grad * weight` products are summed over its scored slices
    first and squared last, so contributions of opposite sign cancel. Shapes and errors as in `gate_gradients`.

    Returns:
        `(group.size,)` in loss²; larger is worse to remove.
    """
    return gate_gradients([group], params, grads)[group.name].square()
