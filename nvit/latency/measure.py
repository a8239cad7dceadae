"""The samples a latency table is made of: which pieces at which widths, their multiply-accumulates or milliseconds."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor, nn

from .. import adapters
from ..spec import KINDS, BlockWidths, Group, Part, ViTSpec, block_widths
from ..structure.compact import compact, meta_copy
from ..structure.masks import full_masks, widths
from .clock import TORCH, Setting, Stopwatch, in_runtime
from .grid import Grid
from .spread import drifted, typical

LEVELS = {"emb": 4, "heads": 3, "qk_dim": 3, "v_dim": 3, "mlp": 5}
"""Grid points per width, dense and smallest included."""

COARSER = (
    {"emb": 4, "heads": 3, "qk_dim": 2, "v_dim": 2, "mlp": 5},
    {"emb": 3, "heads": 2, "qk_dim": 2, "v_dim": 2, "mlp": 3},
    dict.fromkeys(KINDS, 2),
)
"""What becomes of them where the time asked for does not hold as many. Attention is nearly linear in its dims, so that
these go first; the ends are always there."""


@dataclass(frozen=True)
class Samples:
    """What a table of a model needs.

    Attributes:
        adapter: the model's family.
        skeleton: a weightless prepared copy.
        dense: the widths of its blocks.
        bundles: the units of each that leave in one move.
        parts: what it consists of.
    """

    adapter: Any
    skeleton: nn.Module
    dense: tuple[BlockWidths, ...]
    bundles: tuple[BlockWidths, ...]
    parts: tuple[Part, ...]

    def axes(self, levels: Mapping[str, int] | None = None) -> tuple[list[list[int]], ...]:
        """The widths at which each part is sampled, with `levels` or else all of `LEVELS` points: ascending, by part
        and axis."""
        return tuple(points(part, self.dense, self.bundles, levels or LEVELS) for part in self.parts)


def samples_of(model: nn.Module, bundle_sizes: Mapping[str, int]) -> Samples:
    """The samples of a model, dense or compact, which is left as it is."""
    adapter = adapters.find(model)
    skeleton = adapter.prepare(meta_copy(model))
    groups = adapter.groups(skeleton, bundle_sizes)
    dense = widths(groups, full_masks(groups))
    bundles = block_widths(groups, {g.name: g.multiple for g in groups})
    parts = tuple(adapter.parts(skeleton))
    return Samples(adapter, skeleton, dense, bundles, parts)


def sample_images(model: nn.Module, batch_size: int) -> Tensor:
    """Random images of the model's input size, on its device and in its dtype."""
    p = next(model.parameters())
    size = adapters.preprocess(model)["input_size"]
    return torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(0)).to(p.device, p.dtype)


def points(
    part: Part, blocks: Sequence[BlockWidths], bundles: Sequence[BlockWidths], levels: Mapping[str, int]
) -> list[list[int]]:
    """Grid points along each axis: evenly from the smallest that pruning can leave to the widest piece, on bundles."""
    axes = []
    for kind, mine in zip(part.kinds, zip(*part.pieces, strict=True), strict=True):
        found, bundle = [getattr(blocks[b], kind) for b in mine], min(getattr(bundles[b], kind) for b in mine)
        least, most = min(bundle, *found), max(found)
        inner = [round(p / bundle) * bundle for p in np.linspace(least, most, levels[kind])[1:-1]]
        axes.append(sorted({least, most, *(p for p in inner if least < p < most)}))
    return axes


def count_macs(samples: Samples) -> dict[str, Grid]:
    """Multiply-accumulates of an image in units of 1 G, at the ends of every axis: two points, since they are
    multilinear in the widths."""
    grids = {}
    for part, axes in zip(samples.parts, samples.axes(), strict=True):
        macs = samples.adapter.part_macs(samples.skeleton, part)
        ends = [sorted({a[0], a[-1]}) for a in axes]
        grids[part.name] = _grid(part, ends, [macs(*widths) / 1e9 for widths in product(*ends)])
    return grids


@torch.inference_mode()
def time_pieces(
    samples: Samples,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    mode: str = "eager",
    runtime: str = TORCH,
) -> tuple[dict[str, Grid], float]:
    """Milliseconds of a piece of every part at its samples, and of the whole dense model, all timed in turn, in about
    `seconds`, first calls included: on as many of `LEVELS` points as these leave time for.
    """
    end = time.perf_counter() + seconds
    pieces = _Pieces(samples, batch_size, device, dtype, mode, runtime)
    pieces.add(_wanted(samples, samples.axes(COARSER[-1])))
    for levels in (LEVELS, *COARSER):
        axes = samples.axes({kind: min(n, LEVELS[kind]) for kind, n in levels.items()})
        more = [sample for sample in _wanted(samples, axes) if sample not in pieces.at]
        if not more or time.perf_counter() + pieces.seconds(len(more)) < end:
            break
    pieces.add(more)
    rounds = pieces.watch.rounds(end)
    if drifted(rounds[:, 0]):  # pieces that were timed in one state of the machine do not add up with those of another
        rounds = pieces.watch.rounds(time.perf_counter() + seconds / 2)
    dense_ms, *times = typical(rounds).tolist()
    grids = {}
    for i, (part, mine) in enumerate(zip(samples.parts, axes, strict=True)):
        grids[part.name] = _grid(part, mine, [times[pieces.at[i, widths]] for widths in product(*mine)])
    return grids, dense_ms


@torch.inference_mode()
def time_dense(
    samples: Samples,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    mode: str = "eager",
    runtime: str = TORCH,
) -> np.ndarray:
    """Milliseconds of the whole dense model as the machine is now, `(rounds,)`: for `seconds`, three at least."""
    end = time.perf_counter() + seconds
    pieces = _Pieces(samples, batch_size, device, dtype, mode, runtime)
    pieces.add([])
    return pieces.watch.rounds(end, 3)[:, 0]


Sample = tuple[int, tuple[int, ...]]
"""A part by its place, and the widths along its axes."""


def _wanted(samples: Samples, axes: Sequence[Sequence[Sequence[int]]]) -> list[Sample]:
    return [(i, widths) for i, mine in enumerate(axes) for widths in product(*mine)]


class _Pieces:
    """The dense model and pieces of it on one stopwatch.

    All weights are views of one buffer, and all inputs of another, so that large models fit. The first samples have to
    include the widest ones.

    Attributes:
        at: the place of each sample among the pieces.
    """

    def __init__(
        self, samples: Samples, batch_size: int, device: torch.device, dtype: torch.dtype, mode: str, runtime: str
    ) -> None:
        self.samples, self.batch_size = samples, batch_size
        self.spec = samples.adapter.spec(samples.skeleton, samples.dense)
        self.weights = self.inputs = torch.empty(0, device=device, dtype=dtype)
        self.hosts: dict[str, tuple[nn.Module, list[Group]]] = {}
        self.watch, self.runtime, self.making = Stopwatch(device, mode), runtime, 0.0
        self.at: dict[Sample, int] = {}

    def add(self, wanted: Sequence[Sample]) -> None:
        """Make samples ready to be timed, and before the first ones the dense model."""
        adapter, parts = self.samples.adapter, self.samples.parts
        specs = [adapter.sample_spec(self.spec, parts[i], widths) for i, widths in wanted]
        specs = specs if self.at else [self.spec, *specs]
        models = _narrow(adapter, specs, self.hosts)
        if not self.at:
            most = max(p.numel() for m in models for p in m.parameters())
            self.weights = torch.randn(most, out=self.weights.new_empty(most)).mul_(0.02)
        for model in models:
            params = {n: self.weights[: p.numel()].view(p.shape) for n, p in model.named_parameters()}
            adapter.resize(model, params, full_masks(adapter.groups(model))).to(self.weights.dtype)
        hosts = list(models)
        runs = [] if self.at else [(models.pop(0), self.spec.preprocess["input_size"])]
        runs += [adapter.piece(model, parts[i]) for model, (i, _) in zip(models, wanted, strict=True)]
        if not self.at:
            most = self.batch_size * max(math.prod(shape) for _, shape in runs)
            self.inputs = torch.randn(most, out=self.inputs.new_empty(most))
        inputs = [self.inputs[: self.batch_size * math.prod(shape)].view(self.batch_size, *shape) for _, shape in runs]
        calls = [(host, run, x) for host, (run, _), x in zip(hosts, runs, inputs, strict=True)]
        start = time.perf_counter()
        elsewhere = in_runtime(calls, self.runtime)
        self.making += time.perf_counter() - start
        for (_, run, x), there in zip(calls, elsewhere, strict=True):
            self.watch.add(*((run, x) if there is None else (there,)))
        self.at |= {sample: len(self.at) + n for n, sample in enumerate(wanted)}

    def seconds(self, more: int) -> float:
        """What so many further pieces would take: their first calls, and two rounds of everything."""
        start = time.perf_counter()
        self.watch.round()
        steady, (_, *first) = time.perf_counter() - start, self.watch.first
        made = self.making / len(self.watch.first)
        return more * (float(np.mean(first)) + made) + 2 * steady * (1 + more / len(self.watch.first))


def fingerprint(samples: Samples, setting: Setting) -> str:
    """Names a table: the same for models of one shape, measured in one setting at the same samples."""
    spec = samples.adapter.spec(samples.skeleton, samples.dense)
    config = {k: v for k, v in spec.config.items() if k not in ("num_classes", "drop_rate")}
    shape = [[asdict(b) for b in spec.blocks], [asdict(p) for p in samples.parts], samples.axes()]
    key = json.dumps([spec.family, spec.architecture, config, asdict(setting), *shape])
    return hashlib.sha256(f"{key}{scipy.__version__}".encode()).hexdigest()[:16]


def _grid(part: Part, axes: Sequence[Sequence[int]], values: Sequence[float]) -> Grid:
    """The grid of values in the order of `product(*axes)`."""
    return Grid(part.kinds, axes, np.array(values).reshape([len(a) for a in axes]))


def _narrow(
    adapter, specs: Sequence[ViTSpec], hosts: dict[str, tuple[nn.Module, list[Group]]] | None = None
) -> list[nn.Module]:
    """The weightless models of `specs`.

    Args:
        hosts: dense ones behind them by config, each built once with its groups.
    """
    hosts, found = {} if hosts is None else hosts, []
    for spec in specs:
        key = json.dumps(spec.config)
        if key not in hosts:
            model = adapters.build(spec)
            hosts[key] = model, adapter.groups(model)
        model, groups = hosts[key]
        keep = {g.name: torch.arange(g.size) < getattr(spec.blocks[g.blocks[0]], g.kind) for g in groups}
        found.append(compact(model, groups, keep).eval())
        adapter.merge_(found[-1], spec.merges)
    return found
