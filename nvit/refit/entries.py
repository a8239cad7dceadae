"""How a layer's output enters the residual stream, measured: what the stream lacks before a layer can then be made good
by that layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.capture import Place, capture
from ..calibration.replay import Replay
from ..layers import Prunable


@dataclass(frozen=True)
class Entry:
    """How a layer's output enters the stream: `stream + gain * output`, `stream` being what a norm before it reads.

    Attributes:
        norm: name of that norm, whose output the layer reads as it is.
        gain: by channel of the dense stream, `(emb,)`: LayerScale, or ones.
    """

    norm: str
    gain: Tensor

    def lacking(self, ours: Tensor, theirs: Tensor, emb: Tensor | None) -> Tensor:
        """What the stream lacks before the layer, in units of the layer's output, `(rows, kept channels)`.

        Args:
            ours, theirs: rows of the stream in the pruned model and in the dense one.
            emb: kept channels, int64; None for all.
        """
        gain = self.gain if emb is None else self.gain[emb]
        theirs = theirs if emb is None else theirs[:, emb]
        tiny = gain.abs() <= 1e-3 * gain.abs().mean()
        return ((theirs - ours) / gain.masked_fill(tiny, float("inf"))).to(ours)


def refittable(layer: Prunable) -> bool:
    """Whether a layer reads the stream and writes it through linear layers."""
    return {"in", "out"} <= {part.end for part in layer.linears()}


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
    found, misses = [], []
    for i, (name, x, out) in enumerate(calls[:-1]):
        before = next((c for c in calls[:i] if c[0] in norms and c[2] is x), None)
        after = next((c[1] for c in calls[i + 1 :] if c[0] in norms or not c[0]), None)
        if name in norms or before is None or not before[1].shape == after.shape == out.shape:
            continue
        step = (after - before[1]).flatten(0, -2).double()
        out = out.flatten(0, -2).double()
        gain = (step * out).sum(0) / out.square().sum(0).clamp_min(1e-300)
        found.append((name, Entry(before[0], gain)))
        misses.append((step - gain * out).square().sum() - 1e-6 * step.square().sum())
    fits = torch.stack(misses).le(0).tolist() if misses else []  # one look for a block
    return {name: entry for (name, entry), fit in zip(found, fits, strict=True) if fit}
