"""Refit of what pruning leaves, in closed form, from calibration images: no training, no labels.

Block by block, what a linear layer of the pruned model receives is compared with what the dense one receives on the
same images, and a ridge on the *change* of its weight brings its output nearest to the dense output (`ridge.ridge`).
Earlier layers are refitted already when a later one is looked at, so that errors do not pile up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..calibration.capture import Enough, Place, capture
from ..calibration.replay import Replay
from ..calibration.statistics import Seen
from ..layers import Linear, LinearPart, Prunable, prunable_layers
from ..layers.sites import PLAIN
from ..spec import Group
from ..utils.progress import Progress, silent
from .ridge import Change, Moments, ridge


def refittable(layer: Prunable) -> bool:
    """Whether a layer reads the stream and writes it through linear layers."""
    return {"in", "out"} <= {part.end for part in layer.linears()}


def parts(layer: Prunable, end: str) -> list[LinearPart]:
    """The linear layers at one end of a layer."""
    return [part for part in layer.linears() if part.end == end]


@dataclass(frozen=True)
class Entry:
    """How a layer's output enters the stream: `stream + gain * output`, `stream` being what a norm before it reads.

    Attributes:
        norm: name of that norm, whose output the layer reads as it is.
        gain: by channel of the dense stream, `(emb,)`: LayerScale, or ones.
    """

    norm: str
    gain: Tensor


def _read(replay: Replay, layer: str, end: str, batch: int, norm: str | None = None) -> list[Tensor]:
    """Rows that the linear layers at one end of a layer receive, and rows of the stream that `norm` reads."""
    found: dict[Place, Tensor] = {}
    mine = (layer, end)
    sites = prunable_layers(replay.model)[layer].sites()

    def sink(place: Place, x: Tensor, _) -> None:
        found[place] = sites[end].rows(x) if place == mine else PLAIN.rows(x)
        if place == mine:
            raise Enough

    places = [mine] if norm is None else [(norm, "in"), mine]
    with capture(replay.model, places, sink, gradients=False), contextlib.suppress(Enough):
        replay.run(batch)
    return [found[mine], *(found[place] for place in places[:-1])]


def entries(replay: Replay, layers: Mapping[str, Prunable]) -> dict[str, Entry]:
    """How each of a block's layers enters the stream, measured on one batch of the dense model.

    A layer is absent where this is not `stream + gain * output`: norms behind the layer, tokens in another order.
    """
    norms = {n for n, m in layers.items() if "emb" in m.sites()}
    calls: list[tuple[str, Tensor, Tensor]] = []
    entered: dict[str, Tensor] = {}

    def sink(place: Place, x: Tensor, _) -> None:
        name, site = place
        if site == "in":
            entered[name] = x
        else:
            calls.append((name, entered[name], x))

    places = [(n, site) for n, m in layers.items() if n in norms or refittable(m) for site in ("in", "end")]
    with capture(replay.model, places, sink, gradients=False):
        end = replay.run(0)
    end = end if isinstance(end, Tensor) else end[0]
    calls.append(("", end, end))
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
        seen: what `statistics.watch` saw on `dense`: rows count by how much the loss minds them, but for a share
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
                pairs = list(
                    zip(parts(ours_layers[layer_name], end), parts(their_layers[layer_name], end), strict=True)
                )
                weights = _weights(seen, (layer_name, end), uniform)
                error = None
                if end == "out" and layer_name in entry:
                    e = entry[layer_name]
                    error = _StreamError(e.norm, e.gain, pairs[0][0].rows)
                moments = _gather(ours, theirs, (layer_name, end), pairs, first_held, weights, error)
                for (part, _), (train, back) in zip(pairs, moments, strict=True):
                    change = ridge(train, back, constant=part.module.bias is not None)
                    report.append(_row(f"{layer_name}.{end}", change))
                    if change is not None:
                        part.add_(change.weight, change.bias)
        heads = _classifiers(ours_layers, names)
        with _inputs_of(model, heads) as xs, _inputs_of(dense, heads) as exact:
            ours.advance()
            theirs.advance()
        for head, found in xs.items():
            change = _refit_classifier_(ours_layers[head], their_layers[head], found, exact[head], first_held)
            report.append(_row(head, change))
        progress(at + 1, len(names), "refit")
    return report


def _classifiers(layers: Mapping[str, Prunable], blocks: Sequence[str]) -> dict[str, Linear]:
    """Linear layers behind the blocks that read a stream and do not write one."""
    return {n: m for n, m in layers.items() if m.reads_only and not any(n.startswith(f"{b}.") for b in blocks)}


@contextlib.contextmanager
def _inputs_of(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What layers are called with meanwhile, call by call, as rows."""
    found: dict[str, list[Tensor]] = {}
    with capture(
        model,
        [(name, "in") for name in layers],
        lambda place, x, _: found.setdefault(place[0], []).append(PLAIN.rows(x)),
        gradients=False,
    ):
        yield found


def _refit_classifier_(
    ours: Linear, theirs: Linear, xs: Sequence[Tensor], exact: Sequence[Tensor], first_held: int
) -> Change | None:
    """A classifier sees a row an image, too few to choose a ridge for every class: all share one."""
    moments = [Moments.empty(xs[0].shape[1], ours.out_features, xs[0].device) for _ in range(2)]
    (part,) = ours.linears()
    weight, bias = part.kept()
    for b, (x, e) in enumerate(zip(xs, exact, strict=True)):
        target = nn.functional.linear(e, theirs.weight, theirs.bias)
        moments[b >= first_held].add(x, target - nn.functional.linear(x, weight, bias), target)
    change = ridge(*moments, constant=bias is not None, shared=True)
    if change is not None:
        part.add_(change.weight, change.bias)
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
    """What the stream lacks before a layer, in units of the layer's output.

    Attributes:
        norm, gain: as in `Entry`.
        emb: kept channels.
    """

    norm: str
    gain: Tensor
    emb: Tensor | None

    def __call__(self, ours: Tensor, theirs: Tensor) -> Tensor:
        gain = self.gain if self.emb is None else self.gain[self.emb]
        theirs = theirs if self.emb is None else theirs[:, self.emb]
        tiny = gain.abs() <= 1e-3 * gain.abs().mean()
        return ((theirs - ours) / gain.masked_fill(tiny, float("inf"))).to(ours)


def _gather(
    ours: Replay,
    theirs: Replay,
    place: Place,
    pairs: Sequence[tuple[LinearPart, LinearPart]],
    first_held: int,
    weights: Tensor | None,
    error: _StreamError | None,
) -> list[tuple[Moments, Moments]]:
    """Moments of every linear layer at one end, of the batches that fit and of those held back."""
    found: list[tuple[Moments, Moments]] = []
    norm = None if error is None else error.norm
    for b in range(len(ours)):
        x, *before = _read(ours, *place, b, norm)
        exact, *before_exact = _read(theirs, *place, b, norm)
        lacking = error(before[0], before_exact[0]) if error is not None else 0.0
        w = None if weights is None else weights.repeat(len(x) // len(weights)).to(x.device)
        for i, (part, source) in enumerate(pairs):
            target = nn.functional.linear(exact, *replace(source, cols=None, rows=part.rows).kept())
            r = target - nn.functional.linear(x, *part.kept()) + lacking
            if b == 0:
                found.append(tuple(Moments.empty(x.shape[1], r.shape[1], x.device) for _ in range(2)))
            found[i][b >= first_held].add(x, r, target, w)
    return found
