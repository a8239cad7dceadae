"""Queries and keys refitted in turn, in closed form, so that attention logits stay: what a rotation is compared with.

With the keys given, the queries that keep the logits `q̂ k̂ᵀ` nearest to the dense `q kᵀ` aim at `T q`, where
`T = E[k̂ k̂ᵀ]⁻¹ E[k̂ kᵀ]`: what the kept key dims can say of all of them. With the queries given, keys likewise. Softmax
does not see what all keys of an image have in common, so that keys count about their mean over the image's tokens.
Second moments are means over images. Where inputs are the dense model's, the turns end in the truncated singular value
decomposition of the logits under these moments, which a rotation (`nvit.rotation`) has at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nvit.calibration.capture import Place
from nvit.calibration.replay import Reached, Replay
from nvit.calibration.statistics import SiteStatistics
from nvit.layers import Attention, prunable_layers
from nvit.refit.gather import row_weights
from nvit.refit.ridge import Moments, ridge
from nvit.spec import Group

_NEAR = 1e-4
"""Ridge on how far an aim is from the kept dims themselves, in units of their mean second moment."""


class Joint:
    """Second moments of `z = (ours, dense, 1)`, what a layer receives in the pruned and in the dense model. fp64.

    Attributes:
        rows: Σ w z zᵀ over tokens, `(ours + dense + 1,)` squared.
        within: Σ z zᵀ with each image's mean over tokens taken off, the constant apart.
    """

    def __init__(self) -> None:
        self.rows: Tensor | float = 0.0
        self.within: Tensor | float = 0.0

    def add(self, ours: Tensor, dense: Tensor, weights: Tensor) -> None:
        """A batch `(images, tokens, emb)` of each; `weights` `(tokens,)`."""
        one = ours.new_ones(*ours.shape[:2], 1)
        z = torch.cat([ours, dense, one], -1)
        own = torch.cat([z[..., :-1] - z[..., :-1].mean(1, keepdim=True), one], -1)
        self.rows = self.rows + torch.einsum("itd,t,ite->de", z, weights.to(z), z).double()
        self.within = self.within + torch.einsum("itd,ite->de", own, own).double()


def refit_layer_(ours: Attention, theirs: Attention, fit: Joint, held: Joint, turns: int = 1) -> None:
    """Refit a masked layer's queries and keys in place; `held` chooses the strength of the ridge on each change."""
    size, kept = fit.rows.shape[0] - 1, ours.kept_heads
    width = size - theirs.inputs[0].in_features  # of what our layer receives
    heads = torch.arange(theirs.heads) if kept is None else kept
    has_bias = any(name.endswith("bias") for name, _, _ in ours.rows_of("q"))

    def affine(layer: Attention, part: str, start: int) -> Tensor:
        """Of `z`, by head `(heads, dims, size + 1)`."""
        spans = {name.rpartition(".")[2]: _span(tensor, rows) for name, tensor, rows in layer.rows_of(part)}
        own = _own_rows(layer)
        weight = spans["weight"][own] if layer.emb is None else spans["weight"][own][:, layer.emb]
        out = torch.zeros(len(own), size + 1, dtype=torch.float64)
        out[:, start : start + weight.shape[1]] = weight
        if "bias" in spans:
            out[:, -1] = spans["bias"][own]
        return out.view(layer.kept[0], -1, size + 1)

    for _ in range(turns):
        for part, other in (("q", "k"), ("k", "q")):
            way, met = ("rows", "within") if part == "q" else ("within", "rows")
            metric = (getattr(fit, met) + getattr(held, met)) / (fit.rows + held.rows)[-1, -1]
            mine, exact = affine(ours, other, 0), affine(theirs, other, width)[heads]
            if other == "k":
                mine[..., -1] = exact[..., -1] = 0
            select = _selection(ours, theirs, heads)
            square, cross = mine @ metric @ mine.mT, mine @ metric @ exact.mT
            near = (
                _NEAR * square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(square.shape[1]).to(square)
            )
            aim = select + torch.linalg.solve(square + near, cross - square @ select)
            now, target = (t.flatten(0, 1) for t in (affine(ours, part, 0), aim @ affine(theirs, part, width)[heads]))
            change = ridge(
                *(_moments(getattr(j, way), now, target, width) for j in (fit, held)), constant=part == "q" and has_bias
            )
            if change is not None:
                _add_(ours, part, change.weight, change.bias)


def _span(tensor: Tensor, rows: tuple[int, int] | None) -> Tensor:
    return tensor.data if rows is None else tensor.data[rows[0] : rows[1]]


def _own_rows(layer: Attention) -> Tensor:
    """Kept rows of queries, or of keys, among the dense ones."""
    if layer.q_rows is None:
        return torch.arange(layer.heads * layer.qk_dim)
    return layer.q_rows[: layer.kept[0] * layer.kept[1]]


def _selection(ours: Attention, theirs: Attention, heads: Tensor) -> Tensor:
    """`(kept heads, kept dims, dims)`: which dense dims stayed."""
    dims = _own_rows(ours).view(len(heads), -1) - heads[:, None] * theirs.qk_dim
    return torch.eye(theirs.qk_dim, dtype=torch.float64)[dims]


def _moments(zz: Tensor, now: Tensor, target: Tensor, width: int) -> Moments:
    """Of our inputs, and of what outputs `now @ z` lack to `target @ z`."""
    r, x = target - now, slice(0, width)
    squares = [((m @ zz) * m).sum(1) for m in (r, target)]
    return Moments(zz[-1, -1], zz[x, -1], r @ zz[:, -1], zz[x, x], r @ zz[:, x], *squares)


def _add_(layer: Attention, part: str, weight: Tensor, bias: Tensor) -> None:
    own = _own_rows(layer)
    cols = torch.arange(weight.shape[1]) if layer.emb is None else layer.emb
    for name, tensor, rows in layer.rows_of(part):
        if name.endswith("weight"):
            _span(tensor, rows)[own[:, None], cols] += weight.to(tensor)
        elif part == "q":
            _span(tensor, rows)[own] += bias.to(tensor)


@torch.inference_mode()
def refit_logits_(
    model: nn.Module,
    dense: nn.Module,
    groups: Sequence[Group],
    batches: Sequence[Tensor],
    seen: Mapping[Place, SiteStatistics],
    turns: int = 1,
    held: float = 0.2,
) -> None:
    """Refit queries and keys of a masked model, block by block; arguments as in `nvit.refit.refit_`."""
    ours, theirs = Replay(model), Replay(dense)
    names = ours.adapter.block_names(model)
    for images in batches:
        for replay in (ours, theirs):
            replay.enter(images)
    first_held = min(len(ours) - 1, max(1, round(len(ours) * (1 - held))))
    layers, exact = prunable_layers(model), prunable_layers(dense)
    for block in names:
        for name in (n for n, m in layers.items() if n.startswith(f"{block}.") and isinstance(m, Attention)):
            weights, sums = row_weights(seen, (name, "qk"), 0.2), (Joint(), Joint())
            for b in range(len(ours)):
                x, e = _entering(ours, layers[name], b), _entering(theirs, exact[name], b)
                sums[b >= first_held].add(x, e, torch.ones(x.shape[1]) if weights is None else weights)
            refit_layer_(layers[name], exact[name], *sums, turns)
        ours.advance()
        theirs.advance()


def _entering(replay: Replay, layer: nn.Module, batch: int) -> Tensor:
    """What a layer of the current block receives."""
    found = []

    def enter(_, args):
        found.append(args[0])
        raise Reached

    hook = layer.register_forward_pre_hook(enter)
    with contextlib.suppress(Reached):
        replay.run(batch)
    hook.remove()
    return found[0]
