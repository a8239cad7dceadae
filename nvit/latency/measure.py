"""The samples a latency table is made of: which pieces at which widths, their multiply-accumulates or milliseconds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, product
from typing import Any

import numpy as np
import scipy
import torch
from torch import nn

from .. import adapters
from ..spec import BlockWidths, Part, ViTSpec, block_widths
from ..structure.compact import compact, meta_copy
from ..structure.masks import full_masks, widths
from .clock import Setting, time_each
from .grid import Grid

LEVELS = {"emb": 4, "heads": 3, "qk_dim": 3, "v_dim": 3, "mlp": 5}
"""Grid points per width, dense and smallest included."""


@dataclass(frozen=True)
class Samples:
    """What a table of a model needs.

    Attributes:
        adapter: the model's family.
        skeleton: a weightless prepared copy.
        dense: the widths of its blocks.
        parts: what it consists of.
        axes: the widths at which each part is sampled: ascending points, by part and axis.
    """

    adapter: Any
    skeleton: nn.Module
    dense: tuple[BlockWidths, ...]
    parts: tuple[Part, ...]
    axes: tuple[list[list[int]], ...]


def samples_of(model: nn.Module, bundle_sizes: Mapping[str, int]) -> Samples:
    """The samples of a model, dense or compact, which is left as it is."""
    adapter = adapters.find(model)
    skeleton = adapter.prepare(meta_copy(model))
    groups = adapter.groups(skeleton, bundle_sizes)
    dense = widths(groups, full_masks(groups))
    bundles = block_widths(groups, {g.name: g.multiple for g in groups})
    parts = tuple(adapter.parts(skeleton))
    return Samples(adapter, skeleton, dense, parts, tuple(points(part, dense, bundles) for part in parts))


def points(part: Part, blocks: Sequence[BlockWidths], bundles: Sequence[BlockWidths]) -> list[list[int]]:
    """Grid points along each axis: evenly from the smallest that pruning can leave to the widest piece, on bundles."""
    axes = []
    for kind, mine in zip(part.kinds, zip(*part.pieces, strict=True), strict=True):
        found, bundle = [getattr(blocks[b], kind) for b in mine], min(getattr(bundles[b], kind) for b in mine)
        least, most = min(bundle, *found), max(found)
        inner = [round(p / bundle) * bundle for p in np.linspace(least, most, LEVELS[kind])[1:-1]]
        axes.append(sorted({least, most, *(p for p in inner if least < p < most)}))
    return axes


def count_macs(samples: Samples) -> dict[str, Grid]:
    """Multiply-accumulates of an image in units of 1 G, at the ends of every axis: two points, since they are
    multilinear in the widths."""
    grids = {}
    for part, axes in zip(samples.parts, samples.axes, strict=True):
        macs = samples.adapter.part_macs(samples.skeleton, part)
        ends = [sorted({a[0], a[-1]}) for a in axes]
        grids[part.name] = _grid(part, ends, [macs(*widths) / 1e9 for widths in product(*ends)])
    return grids


@torch.inference_mode()
def time_pieces(
    samples: Samples, batch_size: int, device: torch.device, dtype: torch.dtype, seconds: float
) -> tuple[dict[str, Grid], float]:
    """Milliseconds of a piece of every part at its samples, and of the whole dense model, all timed in turn.

    All weights are views of one buffer, and all inputs of another, so that large models fit.
    """
    adapter, spec = samples.adapter, samples.adapter.spec(samples.skeleton, samples.dense)
    each = [(part, widths) for part, axes in zip(samples.parts, samples.axes, strict=True) for widths in product(*axes)]
    models = _narrow(adapter, [spec, *(adapter.sample_spec(spec, part, widths) for part, widths in each)])

    weights = torch.randn(max(p.numel() for m in models for p in m.parameters()), device=device, dtype=dtype)
    weights.mul_(0.02)
    for model in models:
        params = {n: weights[: p.numel()].view(p.shape) for n, p in model.named_parameters()}
        adapter.resize(model, params, full_masks(adapter.groups(model))).to(dtype)

    runs = [(models[0], spec.preprocess["input_size"])]
    runs += [adapter.piece(model, part) for model, (part, _) in zip(models[1:], each, strict=True)]
    inputs = torch.randn(batch_size * max(math.prod(shape) for _, shape in runs), device=device, dtype=dtype)
    calls = [partial(run, inputs[: batch_size * math.prod(shape)].view(batch_size, *shape)) for run, shape in runs]

    dense_ms, *rest = time_each(calls, device, seconds)
    values, grids = iter(rest), {}
    for part, axes in zip(samples.parts, samples.axes, strict=True):
        grids[part.name] = _grid(part, axes, list(islice(values, math.prod(map(len, axes)))))
    return grids, dense_ms


def fingerprint(samples: Samples, setting: Setting) -> str:
    """Names a table: the same for models of one shape, measured in one setting at the same samples."""
    spec = samples.adapter.spec(samples.skeleton, samples.dense)
    config = {k: v for k, v in spec.config.items() if k not in ("num_classes", "drop_rate")}
    shape = [[asdict(b) for b in spec.blocks], [asdict(p) for p in samples.parts], samples.axes]
    key = json.dumps([spec.family, spec.architecture, config, asdict(setting), *shape])
    return hashlib.sha256(f"{key}{scipy.__version__}".encode()).hexdigest()[:16]


def _grid(part: Part, axes: Sequence[Sequence[int]], values: Sequence[float]) -> Grid:
    """The grid of values in the order of `product(*axes)`."""
    return Grid(part.kinds, axes, np.array(values).reshape([len(a) for a in axes]))


def _narrow(adapter, specs: Sequence[ViTSpec]) -> list[nn.Module]:
    """The weightless models of `specs`; the dense one behind them is built once for each config."""
    dense, found = {}, []
    for spec in specs:
        key = json.dumps(spec.config)
        if key not in dense:
            model = adapter.build(spec)
            dense[key] = model, adapter.groups(model)
        model, groups = dense[key]
        keep = {g.name: torch.arange(g.size) < getattr(spec.blocks[g.blocks[0]], g.kind) for g in groups}
        found.append(compact(model, groups, keep).eval())
    return found
