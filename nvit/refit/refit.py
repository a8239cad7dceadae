"""Refit of what pruning leaves, in closed form, from calibration images: no training, no labels.

Block by block, what a linear layer of the pruned model receives is compared with what the dense one receives on the
same images, and a ridge on the *change* of its weight brings its output nearest to the dense output (`moments.ridge`).
Earlier layers are refitted already when a later one is looked at, so that errors do not pile up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration.replay import Reached, Replay
from ..calibration.statistics import Place, Seen, rows_of
from ..layers import Attention, Linear, Norm, Prunable, prunable_layers
from ..spec import Group
from ..utils.progress import Progress, silent
from .ridge import Change, Moments, ridge

Part = tuple[nn.Linear, Tensor | None, Tensor | None]
"""A linear layer with its kept rows and kept columns."""


def refittable(layer: Prunable) -> bool:
    """Whether a layer reads the stream and writes it through linear layers."""
    return hasattr(layer, "last")


def parts(layer: Prunable, end: str) -> list[Part]:
    """The linear layers at the end `in` or `out` of a layer that has both."""
    if isinstance(layer, Attention):
        if end == "out":
            return [(layer.last, layer.emb, layer.out)]
        rows = (layer.q_rows, layer.q_rows, layer.v_rows)
        return [(m, r, layer.emb) for m, r in zip(layer.inputs, rows, strict=False)]
    if end == "out":
        return [(layer.last, layer.emb, layer.hidden)]
    return [(m, layer.first_rows, layer.emb) for m in layer.first]


def _kept(linear: nn.Linear, rows: Tensor | None, cols: Tensor | None) -> tuple[Tensor, Tensor | None]:
    weight = linear.weight if rows is None else linear.weight[rows]
    weight = weight if cols is None else weight[:, cols]
    bias = linear.bias if rows is None or linear.bias is None else linear.bias[rows]
    return weight, bias


def apply_change_(linear: nn.Linear, rows: Tensor | None, cols: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    """Add to the kept part of a linear layer."""
    w = linear.weight.data
    r = torch.arange(w.shape[0], device=w.device) if rows is None else rows
    c = torch.arange(w.shape[1], device=w.device) if cols is None else cols
    w[r[:, None], c[None, :]] += weight.to(w)
    if linear.bias is not None:
        linear.bias.data[r] += bias.to(w)


@contextlib.contextmanager
def reading(layer: Prunable, end: str, sink: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand to `sink`, as rows, what the linear layers at one end of a layer receive, and end the pass there."""

    def tap(kind: str, x: Tensor, axis: int, *_) -> Tensor:
        if kind in ("v_dim", "mlp"):
            sink(rows_of(kind, x, axis))
            raise Reached
        return x

    def enter(_, args):
        sink(args[0].flatten(0, -2))
        raise Reached

    hook = None
    if end == "out":
        layer.tap = tap
    else:
        hook = layer.register_forward_pre_hook(enter)
    try:
        yield
    finally:
        layer.tap = None
        if hook is not None:
            hook.remove()


@dataclass(frozen=True)
class Entry:
    """How a layer's output enters the stream: `stream + gain * output`, `stream` being what a norm before it reads.

    Attributes:
        norm: name of that norm, whose output the layer reads as it is.
        gain: by channel of the dense stream, `(emb,)`: LayerScale, or ones.
    """

    norm: str
    gain: Tensor


def _read(replay: Replay, layer: Prunable, end: str, batch: int, norm: nn.Module | None = None) -> list[Tensor]:
    """Rows that the linear layers at one end of a layer receive, and rows of the stream that `norm` reads."""
    found: list[Tensor] = []
    hook = None
    if norm is not None:
        hook = norm.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, -2)))
    try:
        with reading(layer, end, found.append), contextlib.suppress(Reached):
            replay.run(batch)
    finally:
        if hook is not None:
            hook.remove()
    return found[::-1]


def _first(out: Tensor | tuple) -> Tensor:
    """What a layer gives to the stream, of all that it gives: transformers' attention has its weights beside it."""
    return out if isinstance(out, Tensor) else out[0]


def entries(replay: Replay, layers: Mapping[str, Prunable]) -> dict[str, Entry]:
    """How each of a block's layers enters the stream, measured on one batch of the dense model.

    A layer is absent where this is not `stream + gain * output`: norms behind the layer, tokens in another order.
    """
    norms = {n: m for n, m in layers.items() if isinstance(m, Norm) and m.reads_stream}
    calls: list[tuple[str, Tensor, Tensor]] = []
    hooks = [
        m.register_forward_hook(lambda _, args, out, n=n: calls.append((n, args[0], _first(out))))
        for n, m in layers.items()
        if n in norms or refittable(m)
    ]
    try:
        end = replay.run(0)
    finally:
        for hook in hooks:
            hook.remove()
    calls.append(("", _first(end), _first(end)))
    found = {}
    for i, (name, x, out) in enumerate(calls[:-1]):
        before = next((c for c in calls[:i] if c[0] in norms and c[2] is x), None)
        after = next((c[1] for c in calls[i + 1 :] if c[0] in norms or not c[0]), None)
        if name in norms or before is None or not before[1].shape == after.shape == out.shape:
            continue
        step, out = (after - before[1]).flatten(0, -2).double(), out.flatten(0, -2).double()
        gain = (step * out).sum(0) / out.square().sum(0).clamp_min(1e-300)
        if float((step - gain * out).square().sum()) <= 1e-6 * float(step.square().sum()):
            found[name] = Entry(before[0], gain)
    return found


@torch.inference_mode()
def refit_(
    model: nn.Module,
    dense: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Tensor],
    *,
    seen: Mapping[Place, Seen] | None = None,
    readers: bool = True,
    stream: bool = True,
    held: float = 0.2,
    uniform: float = 0.2,
    progress: Progress = silent,
) -> list[dict]:
    """Refit a masked model to its dense original, in place; only weights change.

    Args:
        dense: the prepared model that was masked, before it was.
        batches: calibration images; the last `held` of them choose the strength of the ridge.
        seen: what `curvature.watch` saw on `dense`: rows count by how much the loss minds them, but for a share
            `uniform` that all have alike. Without it all rows count alike.
        readers: refit what reads the stream (queries, keys, values, first MLP layers) as well as what writes it.
        stream: what writes the stream also makes good what the stream lacks before it, where `entries` finds how.

    Returns:
        By layer and end: squared error per row before and after, held back.
    """
    ours, theirs = Replay(model), Replay(dense)
    names = ours.adapter.block_names(model)
    device = next(model.parameters()).device
    for images in batches:
        for replay in (ours, theirs):
            replay.enter(images.to(device))
    count = len(ours)
    if count < 2:
        raise ValueError(f"refit got {count} batches of calibration images; it needs 2, one to choose the ridge with")
    first_held = min(count - 1, max(1, round(count * (1 - held))))
    ours_layers, their_layers = prunable_layers(model), prunable_layers(dense)
    report = []
    for at, name in enumerate(names):
        inside = {n: m for n, m in their_layers.items() if n.startswith(f"{name}.")}
        entry = entries(theirs, inside) if stream else {}
        for layer_name in (n for n, m in inside.items() if refittable(m)):
            for end in ("in", "out") if readers else ("out",):
                mine, other = ours_layers[layer_name], their_layers[layer_name]
                pairs = list(zip(parts(mine, end), parts(other, end), strict=True))
                weights = _weights(seen, (layer_name, end), uniform)
                error = None
                if end == "out" and layer_name in entry:
                    e = entry[layer_name]
                    error = _StreamError(ours_layers[e.norm], their_layers[e.norm], e.gain, mine.emb)
                moments = _gather(ours, theirs, (mine, other), end, pairs, first_held, weights, error)
                for (linear, rows, cols), (train, back) in zip([p for p, _ in pairs], moments, strict=True):
                    change = ridge(train, back, constant=linear.bias is not None)
                    report.append(_row(f"{layer_name}.{end}", change))
                    if change is not None:
                        apply_change_(linear, rows, cols, change.weight, change.bias)
        with _inputs_of(_classifiers(ours_layers, names)) as xs, _inputs_of(_classifiers(their_layers, names)) as exact:
            ours.advance()
            theirs.advance()
        for head, found in xs.items():
            change = _refit_classifier_(ours_layers[head], their_layers[head], found, exact[head], first_held)
            report.append(_row(head, change))
        progress(at + 1, len(names), "refit")
    return report


def _classifiers(layers: Mapping[str, Prunable], blocks: Sequence[str]) -> dict[str, Linear]:
    """Linear layers behind the blocks that read a stream and do not write one."""
    return {
        n: m
        for n, m in layers.items()
        if isinstance(m, Linear) and m.outputs is None and not any(n.startswith(f"{b}.") for b in blocks)
    }


@contextlib.contextmanager
def _inputs_of(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """What layers are called with meanwhile, call by call."""
    found: dict[str, list[Tensor]] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: found.setdefault(n, []).append(args[0].flatten(0, -2)))
        for n, m in layers.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _refit_classifier_(
    ours: Linear, theirs: Linear, xs: Sequence[Tensor], exact: Sequence[Tensor], first_held: int
) -> Change | None:
    """A classifier sees a row an image, too few to choose a ridge for every class: all share one."""
    moments = [Moments.empty(xs[0].shape[1], ours.out_features, xs[0].device) for _ in range(2)]
    weight, bias = _kept(ours, None, ours.cols)
    for b, (x, e) in enumerate(zip(xs, exact, strict=True)):
        target = nn.functional.linear(e, theirs.weight, theirs.bias)
        moments[b >= first_held].add(x, target - nn.functional.linear(x, weight, bias), target)
    change = ridge(*moments, constant=bias is not None, shared=True)
    if change is not None:
        apply_change_(ours, None, ours.cols, change.weight, change.bias)
    return change


def _row(where: str, change: Change | None) -> dict:
    return (
        {"layer": where, "before": 0.0, "after": 0.0}
        if change is None
        else {"layer": where, "before": change.before, "after": change.after}
    )


def _weights(seen: Mapping[Place, Seen] | None, place: Place, uniform: float) -> Tensor | None:
    """Of the rows of one image, mean 1."""
    if seen is None or place not in seen:
        return None
    profile = seen[place].profile
    mean = profile.mean()
    return None if not float(mean) > 0 else uniform + (1 - uniform) * profile / mean


@dataclass(frozen=True)
class _StreamError:
    """What the stream lacks before a layer, in units of the layer's output."""

    ours: nn.Module
    theirs: nn.Module
    gain: Tensor
    emb: Tensor | None

    def __call__(self, ours: Tensor, theirs: Tensor) -> Tensor:
        gain = self.gain if self.emb is None else self.gain[self.emb]
        theirs = theirs if self.emb is None else theirs[:, self.emb]
        tiny = gain.abs() <= 1e-3 * gain.abs().mean()
        return ((theirs - ours) / gain.masked_fill(tiny, float("inf"))).to(ours)


def _gather(ours, theirs, layers, end, pairs, first_held, weights, error) -> list[tuple[Moments, Moments]]:
    """Moments of every linear layer at one end, of the batches that fit and of those held back."""
    found: list[tuple[Moments, Moments]] = []
    norms = (None, None) if error is None else (error.ours, error.theirs)
    for b in range(len(ours)):
        x, *before = _read(ours, layers[0], end, b, norms[0])
        exact, *before_exact = _read(theirs, layers[1], end, b, norms[1])
        lacking = error(before[0], before_exact[0]) if error is not None else 0.0
        w = None if weights is None else weights.repeat(len(x) // len(weights)).to(x.device)
        for i, ((linear, rows, cols), (source, _, _)) in enumerate(pairs):
            weight, bias = _kept(linear, rows, cols)
            target = nn.functional.linear(exact, *_kept(source, rows, None))
            r = target - nn.functional.linear(x, weight, bias) + lacking
            if b == 0:
                found.append(tuple(Moments.empty(x.shape[1], r.shape[1], x.device) for _ in range(2)))
            found[i][b >= first_held].add(x, r, target, w)
    return found
