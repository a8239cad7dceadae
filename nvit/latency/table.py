"""Latency as a table of widths, measured on the user's device."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice, product
from pathlib import Path

import numpy as np
import scipy
import torch
from torch import nn

from .. import adapters
from ..spec import BUNDLE_SIZES, KINDS, BlockWidths, Part, ViTSpec, block_widths
from ..structure.compact import compact, meta_copy
from ..structure.masks import full_masks, widths
from ..utils.files import write_atomically
from .clock import Setting, current_setting, time_each
from .grid import Grid

LEVELS = {"emb": 4, "heads": 3, "qk_dim": 3, "v_dim": 3, "mlp": 5}
"""Grid points per width, dense and smallest included."""


class LatencyTable:
    """Milliseconds by widths, for one setting.

    Attributes:
        parts: what the model consists of.
        grids: milliseconds of one piece by its widths, for every part by name.
        at: where the widths of every piece are found in `widths.reshape(-1)`, `(pieces, axes)`, by part.
        dense: the blocks of the model it was made for.
        dense_ms: their latency by this table.
        setting: device, dtype, batch, tokens, threads and versions it was measured with; None for an analytic table.

    Raises:
        ValueError: parts that do not fit the blocks, or leave out a width.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        grids: Mapping[str, Grid],
        dense: Sequence[BlockWidths],
        setting: Setting | None,
    ) -> None:
        self.parts, self.grids, self.dense, self.setting = tuple(parts), dict(grids), tuple(dense), setting
        self.at = {part.name: _at(part, len(self.dense)) for part in self.parts}
        left_out = set(range(len(self.dense) * len(KINDS))).difference(*(at.flat for at in self.at.values()))
        if left_out:
            block, kind = divmod(min(left_out), len(KINDS))
            raise ValueError(f"no part of the latency table depends on {KINDS[kind]} of block {block}")
        self.dense_ms = self.model_ms(self.dense)

    def ms(self, widths: np.ndarray) -> float:
        """Milliseconds of a model whose blocks have `widths` `(blocks, 5)`, in the order of `KINDS`."""
        flat = widths.reshape(-1)
        return float(sum(self.grids[name](flat[at]).sum() for name, at in self.at.items()))

    def model_ms(self, blocks: Sequence[BlockWidths]) -> float:
        """Milliseconds of a model with these blocks."""
        return self.ms(width_array(blocks))

    def ratio(self, blocks: Sequence[BlockWidths]) -> float:
        """Predicted latency of `blocks` as a fraction of the dense model's."""
        return self.model_ms(blocks) / self.dense_ms

    def slopes(self) -> dict[str, float]:
        """Milliseconds saved per unit of each kind, mean over the range (paper's Table 5).

        A unit of `emb` leaves every block at once: where streams differ in width, the saving of all that can leave is
        divided by their mean number over blocks.
        """
        dense, found = width_array(self.dense), {}
        least = np.zeros_like(dense)
        for name, at in self.at.items():
            for places, points in zip(at.T, self.grids[name].axes, strict=True):
                least.flat[places] = np.maximum(least.flat[places], points[0])
        for column, kind in enumerate(KINDS):
            low = dense.copy()
            low[:, column] = least[:, column]
            units = (dense - low).sum() / (len(dense) if kind == "emb" else 1)
            found[f"ms_per_{kind}"] = (self.dense_ms - self.ms(low)) / units if units else 0.0
        return found

    def check(self, setting: Setting, dense: Sequence[BlockWidths]) -> None:
        """Raise ValueError where this table was measured for something else than `setting` and `dense`.

        A different library version is let pass: it is named in the report.
        """
        if self.setting is not None:
            for field in ("device", "dtype", "batch_size", "tokens", "threads"):
                mine, theirs = getattr(self.setting, field), getattr(setting, field)
                if mine != theirs:
                    raise ValueError(
                        f"latency table was measured with {field.replace('_', ' ')} {mine}, this run has {theirs}. "
                        "Measure one here with `nvit latency`, or leave out the table to have it measured."
                    )
        if self.dense != tuple(dense):
            raise ValueError(
                f"latency table is for a model of {len(self.dense)} blocks, the first {self.dense[0]}; "
                f"this model has {len(dense)}, the first {dense[0]}. Measure a table for this model."
            )

    def to_json(self) -> str:
        parts = {
            p.name: {"kinds": p.kinds, "pieces": p.pieces, "axes": g.axes, "values": g.values.round(6).tolist()}
            for p, g in ((p, self.grids[p.name]) for p in self.parts)
        }
        setting = None if self.setting is None else asdict(self.setting)
        dense = [asdict(b) for b in self.dense]
        return json.dumps({"unit": "ms", "setting": setting, "dense": dense, "parts": parts}) + "\n"

    def save(self, path: str | Path) -> None:
        write_atomically(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            ValueError: not a latency table.
        """
        try:
            raw = json.loads(Path(path).read_text())
            parts, grids = [], {}
            for name, p in raw["parts"].items():
                if not np.isfinite(p["values"]).all() or any(list(a) != sorted(set(a)) for a in p["axes"]):
                    raise ValueError("widths have to ascend and milliseconds to be finite")
                parts.append(Part(name, tuple(p["kinds"]), tuple(map(tuple, p["pieces"]))))
                grids[name] = Grid(p["kinds"], p["axes"], p["values"])
            setting = None if raw["setting"] is None else Setting(**raw["setting"])
            return cls(parts, grids, [BlockWidths(**b) for b in raw["dense"]], setting)
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            reason = f"{type(e).__name__}: {e}"
            raise ValueError(f"{path} is not a latency table ({reason}); make one with `nvit latency`") from None

    @classmethod
    def analytic(cls, model: nn.Module, bundle_sizes: Mapping[str, int] = BUNDLE_SIZES) -> LatencyTable:
        """A table of multiply-accumulates, 1 GMAC an image counted as 1 ms: for tests, and machines that are not here.

        MACs are multilinear in the widths, so two points an axis make it exact.
        """
        adapter, skeleton, blocks, bundles = _skeleton(model, bundle_sizes)
        parts, grids = adapter.parts(skeleton), {}
        for part in parts:
            macs = adapter.part_macs(skeleton, part)
            axes = [sorted({points[0], points[-1]}) for points in _levels(part, blocks, bundles)]
            grids[part.name] = _grid(part, axes, [macs(*widths) / 1e9 for widths in product(*axes)])
        return cls(parts, grids, blocks, None)

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        batch_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        *,
        bundle_sizes: Mapping[str, int] = BUNDLE_SIZES,
        seconds: float = 40.0,
        cache: Path | None = None,
    ) -> LatencyTable:
        """Measure a table for `model` (dense or compact; unchanged) on this device, in about `seconds`.

        Args:
            dtype: parameters' and inputs', as `torch.bfloat16` or `"bfloat16"`.
            cache: a folder; a table measured there for the same model shape and setting is used again.
        """
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        device = torch.device(device)
        adapter, skeleton, blocks, bundles = _skeleton(model, bundle_sizes)
        setting = current_setting(device, dtype, batch_size, adapter.tokens(skeleton))
        spec = adapter.spec(skeleton, blocks)
        parts = adapter.parts(skeleton)
        axes = [_levels(part, blocks, bundles) for part in parts]
        path = None if cache is None else cache / f"{_fingerprint(spec, setting, parts, axes)}.json"
        if path is not None and path.exists():
            return cls.load(path)
        times, dense_ms = _measure_parts(adapter, spec, parts, axes, batch_size, device, dtype, seconds)
        grids = {part.name: _grid(part, points, ms) for part, points, ms in zip(parts, axes, times, strict=True)}
        scale = dense_ms / cls(parts, grids, blocks, setting).dense_ms
        scaled = {name: Grid(g.kinds, g.axes, g.values * scale) for name, g in grids.items()}
        table = cls(parts, scaled, blocks, setting)
        if path is not None:
            table.save(path)
        return table


def default_cache() -> Path:
    """Where measured tables are kept: `$NVIT_CACHE`, or `nvit` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NVIT_CACHE") or Path(base) / "nvit") / "latency"


def _skeleton(model: nn.Module, bundle_sizes: Mapping[str, int]):
    """Adapter, weightless prepared copy, widths, and units that leave each of them in one move, of a model that is left
    as it is."""
    adapter = adapters.find(model)
    skeleton = adapter.prepare(meta_copy(model))
    groups = adapter.groups(skeleton, bundle_sizes)
    bundles = block_widths(groups, {g.name: g.multiple for g in groups})
    return adapter, skeleton, widths(groups, full_masks(groups)), bundles


def width_array(blocks: Sequence[BlockWidths]) -> np.ndarray:
    """Widths `(blocks, 5)` in the order of `KINDS`."""
    return np.array([[getattr(b, kind) for kind in KINDS] for b in blocks])


def _at(part: Part, depth: int) -> np.ndarray:
    """Where the widths of each piece lie in a flat array of widths, `(pieces, axes)`."""
    pieces = np.array(part.pieces, dtype=int)
    if pieces.shape[1:] != (len(part.kinds),) or pieces.min() < 0 or pieces.max() >= depth:
        raise ValueError(f"every piece of {part.name} has to name one of {depth} blocks per axis ({part.kinds})")
    return pieces * len(KINDS) + [KINDS.index(kind) for kind in part.kinds]


def _levels(part: Part, blocks: Sequence[BlockWidths], bundles: Sequence[BlockWidths]) -> list[list[int]]:
    """Grid points along each axis: evenly from the smallest that pruning can leave to the widest piece, on bundles."""
    axes = []
    for kind, mine in zip(part.kinds, zip(*part.pieces, strict=True), strict=True):
        found, g = [getattr(blocks[b], kind) for b in mine], min(getattr(bundles[b], kind) for b in mine)
        least, most = min(g, *found), max(found)
        inner = [round(p / g) * g for p in np.linspace(least, most, LEVELS[kind])[1:-1]]
        axes.append(sorted({least, most, *(p for p in inner if least < p < most)}))
    return axes


def _grid(part: Part, axes: Sequence[Sequence[int]], values: Sequence[float]) -> Grid:
    """The grid of values in the order of `product(*axes)`."""
    return Grid(part.kinds, axes, np.array(values).reshape([len(a) for a in axes]))


def _fingerprint(spec: ViTSpec, setting: Setting, parts: Sequence[Part], axes: Sequence) -> str:
    config = {k: v for k, v in spec.config.items() if k not in ("num_classes", "drop_rate")}
    shape = [[asdict(b) for b in spec.blocks], [asdict(p) for p in parts], axes]
    key = json.dumps([spec.family, spec.architecture, config, asdict(setting), *shape])
    return hashlib.sha256(f"{key}{scipy.__version__}".encode()).hexdigest()[:16]


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


@torch.inference_mode()
def _measure_parts(adapter, spec, parts, axes, batch_size, device, dtype, seconds):
    """Milliseconds of every part at the points of its axes in turn, and of the whole dense model, all timed in turn.

    All weights are views of one buffer, and all inputs of another, so that large models fit.
    """
    points = [(part, widths) for part, mine in zip(parts, axes, strict=True) for widths in product(*mine)]
    specs = [spec, *(adapter.sample_spec(spec, part, widths) for part, widths in points)]
    models = _narrow(adapter, specs)
    weights = torch.randn(max(p.numel() for m in models for p in m.parameters()), device=device, dtype=dtype)
    weights.mul_(0.02)
    for model in models:
        params = {n: weights[: p.numel()].view(p.shape) for n, p in model.named_parameters()}
        adapter.resize(model, params, full_masks(adapter.groups(model))).to(dtype)
    runs = [(models[0], spec.preprocess["input_size"])]
    runs += [adapter.piece(model, part) for model, (part, _) in zip(models[1:], points, strict=True)]
    inputs = torch.randn(batch_size * max(math.prod(shape) for _, shape in runs), device=device, dtype=dtype)
    calls = [partial(run, inputs[: batch_size * math.prod(shape)].view(batch_size, *shape)) for run, shape in runs]
    dense_ms, *rest = time_each(calls, device, seconds)
    rest = iter(rest)
    return [list(islice(rest, math.prod(map(len, mine)))) for mine in axes], dense_ms
