"""Latency as a table of widths, measured on the user's device; the only stopwatch in nvit.

A model is the sum of its blocks' attention parts (emb, heads, qk_dim, v_dim), their MLP parts (emb, mlp) and the rest
(embedding, final norm, classifier: emb). Each is measured on a grid and interpolated multilinearly, as the work itself
is multilinear in the widths. The whole dense model is timed in the same rounds, and all parts are scaled alike so that
they add up to it: timed alone, a part pays for a launch that a model hides.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import scipy
import torch
from torch import Tensor, nn

from . import adapters
from .files import write_atomically
from .grid import Grid
from .masks import compact, full_masks, meta_copy, widths
from .spec import BUNDLE_SIZES, KINDS, BlockWidths, ViTSpec

PARTS = {"attention": ("emb", "heads", "qk_dim", "v_dim"), "mlp": ("emb", "mlp"), "rest": ("emb",)}
"""The widths that the latency of each part depends on."""

_PART_OF = {"emb": "rest", "heads": "attention", "qk_dim": "attention", "v_dim": "attention", "mlp": "mlp"}

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)

LEVELS = {"emb": 4, "heads": 3, "qk_dim": 3, "v_dim": 3, "mlp": 5}
"""Grid points per width, dense and smallest included."""


@dataclass(frozen=True)
class Setting:
    """What a latency was measured on; a table speaks for no other setting."""

    device: str
    dtype: str
    batch_size: int
    tokens: int
    threads: int
    versions: str


def device_name(device: torch.device | str) -> str:
    """The processor's or GPU's own name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")] if cpuinfo.exists() else []
    return models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()


def current_setting(device: torch.device | str, dtype: torch.dtype, batch_size: int, tokens: int) -> Setting:
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 0
    return Setting(
        device_name(device),
        str(dtype).removeprefix("torch."),
        batch_size,
        tokens,
        threads,
        f"torch {torch.__version__}",
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "cpu" and torch.get_num_threads() == 1:
        # A lone thread's own time is its latency on an idle core, whatever else the machine does meanwhile.
        return time.thread_time()
    return time.perf_counter()


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed, from here on.

    By default it gives large blocks back to the system and faults them in again: a tenth of a whole model's time, but
    nothing for one of its parts, so that parts would not add up.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)


def time_each(calls: Sequence[Callable[[], object]], device: torch.device | str, seconds: float) -> list[float]:
    """Median milliseconds of each call, all of them in turn, round after round, so that drift meets all alike.

    The first round is a warm-up. At least one more follows, then as many as fit in `seconds`.
    """
    device = torch.device(device)
    if device.type == "cpu":
        _keep_freed_memory()
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 2 or time.perf_counter() < end:
        row = []
        for call in calls:
            start = _now(device)
            call()
            row.append((_now(device) - start) * 1e3)
        rounds.append(row)
    return np.median(rounds[1:], axis=0).tolist()


@torch.inference_mode()
def time_models(models: Sequence[nn.Module], images: Tensor, seconds: float = 10.0) -> list[float]:
    """Median milliseconds of a forward pass of each model on `images`, measured in turn."""
    was = [m.training for m in models]
    times = time_each([partial(m.eval(), images) for m in models], images.device, seconds)
    for m, training in zip(models, was, strict=True):
        m.train(training)
    return times


class LatencyTable:
    """Milliseconds by widths, for one setting.

    Attributes:
        setting: device, dtype, batch, tokens, threads and versions it was measured with; None for an analytic table.
        dense: the blocks of the model it was made for.
        dense_ms: their latency by this table.
        grids: a grid per part of `PARTS`.
    """

    def __init__(
        self,
        grids: Mapping[str, tuple[Mapping[str, Sequence[int]], np.ndarray]],
        dense: Sequence[BlockWidths],
        setting: Setting | None,
    ) -> None:
        self.setting, self.dense = setting, tuple(dense)
        self.grids = {part: Grid(*grids[part]) for part in PARTS}
        self.dense_ms = self.model_ms(self.dense)

    def block_ms(self, widths: np.ndarray) -> np.ndarray:
        """Milliseconds of blocks with `widths` `(..., 5)` in the order of `KINDS`; returns `(...)`."""
        return self.grids["attention"](widths) + self.grids["mlp"](widths)

    def rest_ms(self, emb: np.ndarray) -> np.ndarray:
        """Milliseconds of everything but the blocks, by stream width `(...)`."""
        widths = np.zeros((*np.shape(emb), len(KINDS)), dtype=int)
        widths[..., KINDS.index("emb")] = emb
        return self.grids["rest"](widths)

    def model_ms(self, blocks: Sequence[BlockWidths]) -> float:
        """Milliseconds of a model with these blocks."""
        widths = np.array([[getattr(b, kind) for kind in KINDS] for b in blocks])
        return float(self.block_ms(widths).sum() + self.rest_ms(widths[:1, 0])[0])

    def ratio(self, blocks: Sequence[BlockWidths]) -> float:
        """Predicted latency of `blocks` as a fraction of the dense model's."""
        return self.model_ms(blocks) / self.dense_ms

    def slopes(self) -> dict[str, float]:
        """Milliseconds saved per unit of each kind, mean over the range, all blocks for `emb` (paper's Table 5)."""
        found = {}
        for kind in KINDS:
            low = [replace(b, **{kind: self.grids[_PART_OF[kind]].axes[kind][0]}) for b in self.dense]
            units = sum(getattr(b, kind) - getattr(s, kind) for b, s in zip(self.dense, low, strict=True))
            per_unit = (self.dense_ms - self.model_ms(low)) / units if units else 0.0
            found[f"ms_per_{kind}"] = per_unit * len(self.dense) if kind == "emb" else per_unit
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
        grids = {p: {"axes": g.axes, "values": g.values.round(6).tolist()} for p, g in self.grids.items()}
        setting = None if self.setting is None else asdict(self.setting)
        dense = [asdict(b) for b in self.dense]
        return json.dumps({"unit": "ms", "setting": setting, "dense": dense, "grids": grids}) + "\n"

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
            grids = {p: (g["axes"], np.array(g["values"])) for p, g in raw["grids"].items()}
            for axes, values in grids.values():
                if not np.isfinite(values).all() or any(list(a) != sorted(set(a)) for a in axes.values()):
                    raise ValueError("widths have to ascend and milliseconds to be finite")
            setting = None if raw["setting"] is None else Setting(**raw["setting"])
            return cls(grids, [BlockWidths(**b) for b in raw["dense"]], setting)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as e:
            reason = f"{type(e).__name__}: {e}"
            raise ValueError(f"{path} is not a latency table ({reason}); make one with `nvit latency`") from None

    @classmethod
    def analytic(cls, model: nn.Module, bundle_sizes: Mapping[str, int] = BUNDLE_SIZES) -> LatencyTable:
        """A table of multiply-accumulates, 1 GMAC an image counted as 1 ms: for tests, and machines that are not here.

        MACs are multilinear in the widths, so two points an axis make it exact.
        """
        adapter, skeleton, blocks = _skeleton(model)
        tokens, fixed = adapter.tokens(skeleton), adapter.rest_macs_per_channel(skeleton)
        matrices = adapter.mlp_projections(skeleton)
        axes = {kind: sorted({points[0], points[-1]}) for kind, points in _levels(blocks, bundle_sizes).items()}

        def macs(part: str, emb: int, *w: int) -> float:
            if part == "attention":
                heads, qk, v = w
                return tokens * heads * (emb * (2 * qk + v) + v * emb + tokens * (qk + v))
            return tokens * matrices * emb * w[0] if part == "mlp" else fixed * emb

        return cls(_tabulate(axes, lambda part, w: macs(part, *w) / 1e9), blocks, None)

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
        adapter, skeleton, blocks = _skeleton(model)
        setting = current_setting(device, dtype, batch_size, adapter.tokens(skeleton))
        spec = adapter.spec(skeleton, blocks)
        axes = _levels(blocks, bundle_sizes)
        path = None if cache is None else cache / f"{_fingerprint(spec, setting, axes)}.json"
        if path is not None and path.exists():
            return cls.load(path)
        grids, dense_ms = _measure_grids(adapter, spec, axes, setting, device, dtype, seconds)
        scale = dense_ms / cls(grids, blocks, setting).dense_ms
        table = cls({part: (mine, values * scale) for part, (mine, values) in grids.items()}, blocks, setting)
        if path is not None:
            table.save(path)
        return table


def default_cache() -> Path:
    """Where measured tables are kept: `$NVIT_CACHE`, or `nvit` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NVIT_CACHE") or Path(base) / "nvit") / "latency"


def _skeleton(model: nn.Module):
    """Adapter, weightless prepared copy and widths of a model that is left as it is."""
    adapter = adapters.find(model)
    skeleton = adapter.prepare(meta_copy(model))
    groups = adapter.groups(skeleton)
    return adapter, skeleton, widths(groups, full_masks(groups))


def _levels(blocks: Sequence[BlockWidths], bundle_sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Grid points per width: evenly from the smallest that pruning can leave to the largest block's, on bundles."""
    axes = {}
    for kind in KINDS:
        most, g = max(getattr(b, kind) for b in blocks), bundle_sizes[kind]
        least = min(g, *(getattr(b, kind) for b in blocks))
        inner = [round(p / g) * g for p in np.linspace(least, most, LEVELS[kind])[1:-1]]
        axes[kind] = sorted({least, most, *(p for p in inner if least < p < most)})
    return axes


def _tabulate(axes: Mapping[str, Sequence[int]], value: Callable[[str, tuple[int, ...]], float]):
    grids = {}
    for part, kinds in PARTS.items():
        mine = {kind: axes[kind] for kind in kinds}
        shape = tuple(len(a) for a in mine.values())
        points = np.stack(np.meshgrid(*mine.values(), indexing="ij"), -1).reshape(-1, len(kinds))
        grids[part] = (mine, np.array([value(part, tuple(int(v) for v in p)) for p in points]).reshape(shape))
    return grids


def _fingerprint(spec: ViTSpec, setting: Setting, axes: Mapping) -> str:
    config = {k: v for k, v in spec.config.items() if k not in ("num_classes", "drop_rate")}
    key = json.dumps([spec.family, spec.architecture, config, [asdict(b) for b in spec.blocks], asdict(setting), axes])
    return hashlib.sha256(f"{key}{scipy.__version__}".encode()).hexdigest()[:16]


def _narrow(adapter, spec: ViTSpec) -> nn.Module:
    """The weightless model of `spec`."""
    dense = adapter.build(spec)
    groups = adapter.groups(dense)
    keep = {g.name: torch.arange(g.size) < getattr(spec.blocks[g.blocks[0]], g.kind) for g in groups}
    return compact(dense, groups, keep).eval()


@torch.inference_mode()
def _measure_grids(adapter, spec, axes, setting, device, dtype, seconds):
    """Grids, and milliseconds of the whole dense model, everything timed in turn.

    All weights are views of one buffer, so that large models fit.
    """
    dense = {kind: points[-1] for kind, points in axes.items()}

    def one_block(widths: BlockWidths) -> ViTSpec:
        return replace(spec, config={**spec.config, "depth": 1}, blocks=(widths,))

    whole = _narrow(adapter, spec)
    largest = max(p.numel() for m in (whole, _narrow(adapter, one_block(BlockWidths(**dense)))) for p in m.parameters())
    weights = torch.randn(largest, device=device, dtype=dtype).mul_(0.02)
    stream = torch.randn(setting.batch_size * setting.tokens * dense["emb"], device=device, dtype=dtype)
    images = torch.randn(setting.batch_size, *spec.preprocess["input_size"], device=device, dtype=dtype)

    def fill(model: nn.Module) -> nn.Module:
        params = {n: weights[: p.numel()].view(p.shape) for n, p in model.named_parameters()}
        return adapter.resize(model, params, full_masks(adapter.groups(model)))

    fill(whole)
    calls, index = [lambda: whole(images)], {}
    for part, kinds in PARTS.items():
        for point in np.stack(np.meshgrid(*(axes[k] for k in kinds), indexing="ij"), -1).reshape(-1, len(kinds)):
            point = tuple(int(v) for v in point)
            block = BlockWidths(**(dense | dict(zip(kinds, point, strict=True))))
            run = adapter.part(fill(_narrow(adapter, one_block(block))), part)
            x = stream[: setting.batch_size * setting.tokens * point[0]].view(setting.batch_size, -1, point[0])
            index[part, point] = len(calls)
            calls.append(lambda run=run, x=images if part == "rest" else x: run(x))
    times = time_each(calls, device, seconds)
    return _tabulate(axes, lambda part, point: times[index[part, point]]), times[0]
