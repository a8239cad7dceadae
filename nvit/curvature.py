"""What the loss minds at the places where units leave: second moments of activations and of their gradients.

The loss' curvature at the logits is the Gauss-Newton (here also the Fisher) matrix diag(p) - p pᵀ of cross entropy. Its
square root times random signs is sent backward, so that the mean of gradient products is the curvature seen from inside
the model. No labels are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import adapters
from .modules import prunable_layers
from .progress import Progress, silent
from .saliency import leave_in_turn
from .spec import Group
from .taps import observed

_TAP = {"heads": None, "v_dim": "out", "mlp": "out", "qk_dim": "qk", "emb": "emb"}
"""Which of a layer's places a tap of a kind reads; `heads` and `v_dim` see the same activation."""


@dataclass
class Seen:
    """Sums at one place over images; `d` counts what a row there holds.

    Attributes:
        images, rows: how many.
        x, xx: Σ x `(d,)`, Σ x xᵀ `(d, d)` over rows.
        gg: Σ g gᵀ `(d, d)`.
        profile: Σ |g|² by row of an image `(rows per image,)`.
    """

    images: int = 0
    rows: int = 0
    x: Tensor | float = 0.0
    xx: Tensor | float = 0.0
    gg: Tensor | float = 0.0
    profile: Tensor | float = 0.0

    def add(self, x: Tensor, g: Tensor, images: int) -> None:
        """Rows `(rows, d)` of a batch, those of an image one after another."""
        self.images, self.rows = self.images + images, self.rows + len(x)
        self.x = self.x + x.sum(0, dtype=torch.float64)
        self.xx = self.xx + (x.T @ x).double()
        self.gg = self.gg + (g.T @ g).double()
        self.profile = self.profile + g.square().sum(1).view(images, -1).sum(0, dtype=torch.float64)

    @property
    def covariance(self) -> Tensor:
        """Of rows, `(d, d)`."""
        mean = self.x / self.rows
        return self.xx / self.rows - torch.outer(mean, mean)

    @property
    def curvature(self) -> Tensor:
        """Σ over an image's rows of the curvature, `(d, d)`: loss per squared change."""
        return self.gg / self.images


class GateProducts:
    """Σ over images of the products of two gate gradients, the gates of single dims at one place.

    Attributes:
        images: how many.
        sums: `(d, d)` fp64 by place; gates of the stream count at all its places together, under `(group, "emb")`.
    """

    def __init__(self) -> None:
        self.images, self.sums, self._now = 0, {}, {}

    def add(self, place: Place, products: Tensor) -> None:
        """Activation times gradient of a batch, summed over an image's rows, `(images, d)`.

        A norm that reads several tokens side by side has as many dims for a channel of the stream.
        """
        before = self._now.get(place, torch.zeros_like(products))
        d = min(before.shape[1], products.shape[1])
        self._now[place] = sum(p.view(len(p), -1, d).sum(1) for p in (before, products))

    def close_batch(self) -> None:
        """All places of the batch were there."""
        for place, p in self._now.items():
            self.sums[place] = (self.sums.get(place, 0.0) + p.T @ p).double()
        self.images += max((len(p) for p in self._now.values()), default=0)
        self._now.clear()


Place = tuple[str, str]
"""Name of a layer, and `out` (where its units leave), `qk` (queries), `emb` (behind a norm) or `in` (what it reads)."""


def probe(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A draw whose second moment is the curvature of cross entropy at `logits` `(batch, classes)`."""
    p = logits.detach().float().softmax(-1)
    signs = torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1
    half = p.sqrt() * signs
    return (half - p * half.sum(-1, keepdim=True)).to(logits)


def rows_of(kind: str, x: Tensor, axis: int, pairs: bool = False) -> Tensor:
    """An activation as a tap gets it, as rows `(places of all images, d)`; dims of all heads side by side, units last.

    Args:
        pairs: a unit of `qk_dim` is a rotary pair, so that queries have one more dimension.
    """
    x = x.movedim(axis, -1)
    if kind == "qk_dim":  # (…, heads, tokens, dims), with pairs (…, heads, tokens, 2, dims)
        inner = 2 if pairs else 1
        return x.movedim(-2 - inner, -1 - inner).flatten(-1 - inner).flatten(0, -2)
    return (x.flatten(-2) if kind == "v_dim" else x).flatten(0, -2)


def watch(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    gates: GateProducts | None = None,
    seed: int = 0,
    total: int = 0,
    progress: Progress = silent,
) -> dict[Place, Seen]:
    """One pass over images through a prepared model, forward and backward; weights are frozen meanwhile.

    Args:
        gates: gathers products of gate gradients beside.

    Raises:
        ValueError: there is no batch.
        FloatingPointError: a logit is not finite.
    """
    seen: dict[Place, Seen] = {}
    layers = prunable_layers(model)
    trainable = {p: p.requires_grad for p in model.parameters()}
    device = next(model.parameters()).device
    images_now = [0]

    def watched(place: Place, kind: str, x: Tensor, axis: int, again: tuple | None = None) -> Tensor:
        pairs = getattr(layers[place[0]], "pairs", None) is not None

        def sink(act: Tensor, grad: Tensor) -> None:
            x, g = (rows_of(kind, t, axis, pairs).float() for t in (act, grad))
            seen.setdefault(place, Seen()).add(x, g, images_now[0])
            if gates is not None and place[1] != "in":
                where = (layers[place[0]].axes["emb"], "emb") if place[1] == "emb" else place
                gates.add(where, (x * g).view(images_now[0], -1, x.shape[1]).sum(1))

        return observed(x, sink, again)

    def tap(name: str):
        def at(kind: str, x: Tensor, axis: int, again: tuple | None = None) -> Tensor:
            place = _TAP[kind]
            return x if place is None else watched((name, place), kind, x, axis, again)

        return at

    def entered(name: str):
        return lambda _, args: (watched((name, "in"), "in", args[0], -1), *args[1:])

    hooks = []
    try:
        for p in trainable:
            p.requires_grad_(False)
        for name, layer in layers.items():
            layer.tap = tap(name)
            if hasattr(layer, "last"):
                hooks.append(layer.register_forward_pre_hook(entered(name)))
        generator = torch.Generator().manual_seed(seed)
        for done, images in enumerate(batches, start=1):
            images_now[0] = len(images)
            cls, dist = adapters.find(model).logits(model, images.to(device))
            logits = cls if dist is None else (cls + dist) / 2
            if not bool(logits.isfinite().all()):
                raise FloatingPointError(f"a logit is not finite on calibration batch {done}; check weights and data")
            logits.backward(probe(logits, generator))
            if gates is not None:
                gates.close_batch()
            progress(done, total, "curvature")
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers.values():
            layer.tap = None
        for p, was in trainable.items():
            p.requires_grad_(was)
    if not seen:
        raise ValueError("no batch of calibration images; the loader gave none")
    return seen


def _places(model: nn.Module, groups: Sequence[Group], seen: Mapping[Place, Seen]) -> dict[str, list[Place]]:
    """Where the units of each group leave.

    Raises:
        ValueError: a group at none of whose places a gradient was seen.
    """
    places: dict[str, list[Place]] = {g.name: [] for g in groups}
    for name, layer in prunable_layers(model).items():
        for axis, group in layer.axes.items():
            place = (name, _TAP.get(axis) or "out")
            if group in places and place in seen:
                places[group].append(place)
    for name, found in places.items():
        if not found:
            raise ValueError(f"{name}: no gradient reached where its units leave; this criterion cannot rank it")
    return places


def _wide(group: Group, mask: Tensor, narrow: Tensor) -> Tensor:
    return narrow.new_zeros(group.size).index_copy_(0, mask.nonzero().squeeze(1).cpu(), narrow.cpu())


def remaining_loss(
    model: nn.Module, groups: Sequence[Group], masks: Mapping[str, Tensor], seen: Mapping[Place, Seen]
) -> dict[str, Tensor]:
    """Loss that stays after a unit is removed and its readers are refitted, by group `(group.size,)`.

    Units of a group leave one after another, the cheapest first. What a unit costs is the curvature times the part of
    it that the kept ones do not predict linearly, as in the optimal brain surgeon (Hassibi & Stork 1993) with the
    weights replaced by what the loss minds about the activation. Query/key dims have no linear reader: their cost is
    curvature times mean square. Scores ascend in the order of leaving, so that sums over a prefix are its cost.

    Raises:
        ValueError: a group at none of whose places a gradient was seen.
    """
    places, scores = _places(model, groups, seen), {}
    for g in groups:
        narrow = _cost(g, int(masks[g.name].sum()), [seen[place] for place in places[g.name]])
        scores[g.name] = _wide(g, masks[g.name], narrow)
    return scores


def curvature_loss(
    model: nn.Module,
    groups: Sequence[Group],
    masks: Mapping[str, Tensor],
    seen: Mapping[Place, Seen],
    gates: GateProducts,
) -> dict[str, Tensor]:
    """Loss that removing a unit adds, those that left before it gone, by group `(group.size,)`; nothing is refitted.

    Removing a set of units costs half the sum of the curvature between their gates over all pairs in it. The curvature
    is the mean of two estimates. Products of gate gradients over images are right on average, but noisy. Those of
    activations times those of gradients (Martens & Grosse 2015, arXiv:1503.05671) have all tokens to average over, but
    take tokens for independent of each other. See `saliency.leave_in_turn` for the order.

    Raises:
        ValueError: a group at none of whose places a gradient was seen.
    """
    places, scores = _places(model, groups, seen), {}
    for g in groups:
        units = int(masks[g.name].sum())

        def by_unit(products: Tensor, kind: str = g.kind, units: int = units) -> Tensor:
            dims = _dims(kind, units, len(products))
            order = dims.flatten().to(products.device)
            return products[order][:, order].view(*dims.shape, *dims.shape).sum((1, 3))

        sampled = [(g.name, "emb")] if g.kind == "emb" else places[g.name]
        total = sum(by_unit(gates.sums[place] / gates.images) for place in sampled)
        total = total + sum(by_unit(seen[p].xx / seen[p].rows * seen[p].curvature) for p in places[g.name])
        scores[g.name] = _wide(g, masks[g.name], leave_in_turn(total / 2))
    return scores


def _cost(group: Group, units: int, seen: Sequence[Seen]) -> Tensor:
    if group.kind == "qk_dim":
        total = sum(s.curvature.diagonal() * s.xx.diagonal() / s.rows for s in seen)
        return total[_dims("qk_dim", units, len(total))].sum(1).cpu()
    problems = [(s.covariance, s.curvature, _dims(group.kind, units, len(s.x))) for s in seen]
    return eliminate(problems, units, chunk=max(1, units // 96))


def _dims(kind: str, units: int, d: int) -> Tensor:
    """Which dims each unit owns, `(units, dims of a unit)`."""
    every = torch.arange(d)
    if kind == "heads":
        return every.view(units, -1)
    return every.view(-1, units).T


def eliminate(problems: Sequence[tuple[Tensor, Tensor, Tensor]], units: int, *, chunk: int = 1, ridge: float = 1e-3):
    """Costs of units that leave one after another (`chunk` at a time), the cheapest first.

    Args:
        problems: places where the units live: covariance `(d, d)`, curvature `(d, d)`, and each unit's dims.
        ridge: added to the covariance, in units of its mean variance.

    Returns:
        fp64 `(units,)`, the loss each adds when it leaves, made to ascend.
    """
    state = []
    for covariance, curvature, dims in problems:
        c = covariance + ridge * float(covariance.diagonal().mean().clamp_min(1e-300)) * torch.eye(len(covariance)).to(
            covariance
        )
        values, vectors = torch.linalg.eigh(curvature)
        root = (values.clamp_min(0).sqrt() * vectors).T
        state.append([torch.linalg.inv(c), root.clone(), dims.to(c.device)])
    alive = torch.ones(units, dtype=torch.bool)
    costs, floor = torch.zeros(units, dtype=torch.float64), 0.0
    while bool(alive.any()):
        left = alive.nonzero().squeeze(1)
        now = torch.zeros(len(left), dtype=torch.float64)
        for precision, root, dims in state:
            own = dims[left]
            block = precision[own[:, :, None], own[:, None, :]]
            mine = root[:, own.flatten()].unflatten(1, own.shape).movedim(1, 0)  # (left, rank, dims)
            energy = mine.transpose(1, 2) @ mine
            now += torch.linalg.solve(block, energy).diagonal(dim1=-2, dim2=-1).sum(-1).cpu()
        first = now.argsort()[:chunk]
        for j in first:
            floor = max(floor, float(now[j]))
            costs[left[j]] = floor
        gone = left[first]
        alive[gone] = False
        for s in state:
            own = s[2][gone].flatten()
            columns = s[0][:, own].clone()
            pivot = torch.linalg.inv(columns[own])
            s[1] -= s[1][:, own].clone() @ pivot @ columns.T
            s[0] -= columns @ pivot @ columns.T
            # Units that left stay invertible and cost nothing.
            s[1][:, own] = 0
            s[0][own], s[0][:, own] = 0, 0
            s[0][own, own] = 1
    return costs
