"""How much the loss minds losing a unit: criteria, the two routes to a gate gradient, and the running mean.

The gate of a unit is a factor of 1 on it. Its gradient is read either from weights and their gradients (a sum of
`grad * weight`), or, without any weight gradient, from the activation on which the unit leaves the network (a sum of
`grad * activation` over tokens); the two are the same number, the second also tells samples apart.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from . import functional
from .modules import prunable_layers
from .spec import Group, Slice
from .taps import observed


def gate_gradients(
    groups: Sequence[Group],
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    slices: Callable[[Group], Sequence[Slice]] = lambda g: g.scored_slices,
) -> dict[str, Tensor]:
    """Gradient of the loss with respect to every unit's gate, from weights (arXiv:2110.04869, Eq. 4).

    Args:
        params: parameters by name, unsharded.
        grads: loss gradients with the same keys and shapes, mean over the batch.
        slices: which slices of a group count.

    Returns:
        By group, `(group.size,)` in loss, fp32 (fp64 for fp64 parameters).

    Raises:
        KeyError: a slice names a parameter without a gradient (frozen, or unused in the loss).
    """
    sizes = [g.size for g in groups]
    starts = dict(zip((g.name for g in groups), [0, *itertools.accumulate(sizes)], strict=False))
    every = [(s.name, *(s.rows or (0, None)), s.view, s.axis, starts[g.name]) for g in groups for s in slices(g)]
    # Fused, it holds every parameter at once: not where they are gathered one at a time.
    if isinstance(params, dict) and (fused := functional.group_dot(params, grads, every)) is not None:
        return dict(zip(starts, fused.split(sizes), strict=True))
    totals, last = {}, (None, None, None)
    for g in groups:
        total = None
        for s in slices(g):
            # Neighbouring groups read the same rows of the same parameter (heads and v_dim share proj).
            if last[:2] != (s.name, s.rows):
                span = slice(None) if s.rows is None else slice(*s.rows)
                last = (s.name, s.rows, _wide(params[s.name][span]) * _wide(grads[s.name][span]))
            part = _sum_but(last[2].reshape(s.view), s.axis)
            total = part if total is None else total.add_(part)
        totals[g.name] = total
    return totals


def _wide(t: Tensor) -> Tensor:
    return t.detach() if t.dtype == torch.float64 else t.detach().float()


def _sum_but(t: Tensor, axis: int) -> Tensor:
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


_AT_ONCE = 2**21
"""Products of activation and gradient that are summed at once."""


class GateRecorder:
    """Reads gate gradients of every group from activations, per sample, while it is open.

    ```python
    with GateRecorder(model, groups, masks) as gates:
        loss.backward()                       # weights may be frozen
    gates.pop()["blocks.0.mlp"]               # (batch, group.size): each sample's share of the batch's gate gradient
    ```
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], masks: Mapping[str, Tensor]) -> None:
        self.layers = prunable_layers(model).values()
        self.groups, self.masks = {g.name: g for g in groups}, masks
        self.sums: dict[str, Tensor] = {}

    def __enter__(self) -> GateRecorder:
        for layer in self.layers:
            kinds = {axis: name for axis, name in layer.axes.items() if name in self.groups}
            if kinds:
                layer.tap = self._tap(kinds)
        return self

    def __exit__(self, *_) -> None:
        for layer in self.layers:
            layer.tap = None

    def _tap(self, kinds: Mapping[str, str]):
        def tap(kind: str, x: Tensor, axis: int, again: tuple | None = None) -> Tensor:
            if kind not in kinds or not torch.is_grad_enabled():
                return x
            return observed(x, functools.partial(self._add, kinds[kind], axis), again)

        return tap

    def _add(self, name: str, axis: int, act: Tensor, grad: Tensor) -> None:
        """Sum `act * grad` over everything but the image and the unit."""
        others = [d for d in range(1, act.dim()) if d != act.dim() + axis]
        # A few images at a time: the products, wider than a bfloat16 activation, are never there as a whole.
        few = max(1, _AT_ONCE // act[0].numel())
        products = (_wide(a) * _wide(g) for a, g in zip(act.split(few), grad.split(few), strict=True))
        part = torch.cat([p.sum(others) if others else p for p in products])
        self.sums[name] = self.sums[name] + part if name in self.sums else part

    def pop(self) -> dict[str, Tensor]:
        """Gate gradients since the last call, `(batch, group.size)`, zero at pruned units.

        Raises:
            KeyError: no backward pass reached a group's layer.
        """
        out = {}
        for name, g in self.groups.items():
            narrow = self.sums[name]
            out[name] = narrow.new_zeros(narrow.shape[0], g.size)
            out[name][:, self.masks[name].to(narrow.device)] = narrow
        self.sums.clear()
        return out


@dataclass
class Evidence:
    """What one batch says about a model, for criteria to read.

    Attributes:
        params, grads: by parameter name; `grads` empty where weights are frozen.
        gates: per-sample gate gradients by group, `(batch, group.size)`, where they were recorded.
        over_ranks: a mean over ranks of tensors by name; gates are of this rank's samples, `grads` are means already.
    """

    params: Mapping[str, Tensor]
    grads: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Mapping[str, Tensor] | None = None
    seed: int = 0
    over_ranks: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict

    def gate_gradients(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """`(group.size,)` by group: recorded ones summed over samples, else from weights."""
        if self.gates is not None:
            return self.over_ranks({g.name: self.gates[g.name].sum(0) for g in groups})
        return gate_gradients(groups, self.params, self.grads)


Scores = dict[str, Tensor]


def hessian(groups: Sequence[Group], seen: Evidence) -> Scores:
    """Squared gate gradient, the gate placed where the unit leaves the network. loss²"""
    return {name: total.square() for name, total in seen.gate_gradients(groups).items()}


def nvit(groups: Sequence[Group], seen: Evidence) -> Scores:
    """Squared gate gradient over the tensors of the published runs, divided by theirs per kind. loss²"""
    totals = gate_gradients(groups, seen.params, seen.grads, lambda g: g.published_slices)
    return {g.name: (totals[g.name] / g.divisor).square() for g in groups}


def absolute(groups: Sequence[Group], seen: Evidence) -> Scores:
    """Mean over samples of the absolute gate gradient of the sample's own loss. loss"""
    return seen.over_ranks({g.name: seen.gates[g.name].abs().sum(0) for g in groups})


SHRINK = 0.5
"""What products of different units count in `fisher`: of a thousand samples, half of what they say is noise."""


def gate_products(groups: Sequence[Group], seen: Evidence) -> Scores:
    """Mean over samples of the products of two units' gate gradients, `(group.size, group.size)`. loss²"""
    here = torch.tensor([float(len(seen.gates[groups[0].name]))], dtype=torch.float64)
    share = float(seen.over_ranks({"samples": here})["samples"])  # each gate gradient is one of so many
    return seen.over_ranks({g.name: share * seen.gates[g.name].T @ seen.gates[g.name] for g in groups})


def leave_in_turn(products: Tensor) -> Tensor:
    """Saliency of units that leave one by one, each judged by what is gone already.

    With the Fisher matrix F of the gates in place of the Hessian, removing a set of units costs ½ Σ F over all pairs
    in it (as in optimal brain surgery, Hassibi & Stork 1992, without its update of what stays). The unit that adds
    least leaves next. Its saliency is what it adds, or what an earlier one added if that was more, by a last digit
    apart, so that sorting by saliency gives the order back.

    Args:
        products: F, `(units, units)`, symmetric.

    Returns:
        fp64 `(units,)` on the CPU, in loss².
    """
    pairs = products.detach().cpu().double().numpy()
    adds, saliency, most = pairs.diagonal() / 2, np.empty(len(pairs)), 0.0
    for _ in range(len(pairs)):
        unit = int(adds.argmin())
        most = saliency[unit] = max(adds[unit], np.nextafter(most, np.inf))
        adds += pairs[unit]
        adds[unit] = np.inf
    return torch.from_numpy(saliency)


def shrunk_in_turn(products: Tensor) -> Tensor:
    """`leave_in_turn` with the `gate_products` of different units shrunk by `SHRINK`."""
    products = products.detach().cpu().double()
    diagonal = products.diagonal().diag()
    return leave_in_turn(diagonal + SHRINK * (products - diagonal))


def taylor(groups: Sequence[Group], seen: Evidence) -> Scores:
    """Sum of squared `grad * weight` over a unit's weights (Molchanov et al. 2019, arXiv:1906.10771, Eq. 8). loss²"""
    return _over_weights(groups, lambda s: s.of(_wide(seen.params[s.name]) * _wide(seen.grads[s.name])).square())


def magnitude(groups: Sequence[Group], seen: Evidence) -> Scores:
    """Mean squared weight of a unit. weight²"""
    count = {g.name: sum(_units(s) for s in g.scored_slices) for g in groups}
    sums = _over_weights(groups, lambda s: s.of(_wide(seen.params[s.name])).square())
    return {g.name: sums[g.name] / count[g.name] for g in groups}


def random(groups: Sequence[Group], seen: Evidence) -> Scores:
    """Uniform in [0, 1), the same for every batch of a run: a floor for comparisons."""
    # torch's CPU generator takes 32 bits of a seed, so that both parts have to be in them.
    draws = {g.name: torch.Generator().manual_seed(zlib.crc32(f"{seen.seed} {g.name}".encode())) for g in groups}
    return {g.name: torch.rand(g.size, generator=draws[g.name]) for g in groups}


def _units(s: Slice) -> int:
    weights = 1
    for d, size in enumerate(s.view):
        weights *= size if d != s.axis else 1
    return weights


def _over_weights(groups: Sequence[Group], value: Callable[[Slice], Tensor]) -> Scores:
    return {g.name: sum(_sum_but(value(s), s.axis) for s in g.scored_slices) for g in groups}


@dataclass(frozen=True)
class Criterion:
    """A saliency, what it reads, and what turns its mean over batches into scores.

    Attributes:
        score: what one batch says, by group.
        reads: `gates` (per sample), `weights` (with gradients), `either`, or `nothing`.
        finish: from a group's mean over batches to its scores `(group.size,)`; None where it is them already.
    """

    score: Callable[[Sequence[Group], Evidence], Scores]
    reads: str
    finish: Callable[[Tensor], Tensor] | None = None

    def memory(self, groups: Sequence[Group]) -> int:
        """Bytes of what one batch says and of its mean over batches."""
        return 2 * 4 * sum(g.size if self.finish is None else g.size**2 for g in groups)

    def scores(self, mean: Mapping[str, Tensor]) -> Scores:
        """Saliency by group, `(group.size,)`, from the mean over batches."""
        return dict(mean) if self.finish is None else {name: self.finish(t) for name, t in mean.items()}


CRITERIA: dict[str, Criterion] = {
    "hessian": Criterion(hessian, "either"),
    "nvit": Criterion(nvit, "weights"),
    "abs": Criterion(absolute, "gates"),
    "fisher": Criterion(gate_products, "gates", shrunk_in_turn),
    "taylor": Criterion(taylor, "weights"),
    "magnitude": Criterion(magnitude, "nothing"),
    "random": Criterion(random, "nothing"),
}


class RunningMean:
    """Mean of scores over batches: plain, or exponential with its start-up bias corrected (`momentum`)."""

    def __init__(self, momentum: float | None = None) -> None:
        self.momentum, self.count, self.sums = momentum, 0, {}

    def update(self, scores: Mapping[str, Tensor]) -> None:
        """Add one batch.

        Raises:
            ValueError: a score is not finite; the mean is left as it was.
        """
        for name, s in scores.items():
            if not bool(torch.isfinite(s).all()):
                raise ValueError(f"{name}: saliency is not finite after {self.count} good batches; the loss diverged")
        keep, add = (1.0, 1.0) if self.momentum is None else (self.momentum, 1 - self.momentum)
        for name, s in scores.items():
            self.sums[name] = self.sums[name].mul_(keep).add_(s, alpha=add) if name in self.sums else s * add
        self.count += 1

    def value(self) -> Scores:
        """The mean so far, by group."""
        if not self.count:
            raise ValueError("no batch has been scored yet; the loader gave none")
        weight = self.count if self.momentum is None else 1 - self.momentum**self.count
        return {name: s / weight for name, s in self.sums.items()}
