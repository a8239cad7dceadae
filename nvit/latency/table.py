"""Latency as a table of widths, measured on the user's device."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..spec import BUNDLE_SIZES, KINDS, TITLES, BlockWidths, Part
from ..utils import html
from ..utils.files import cache_folder, write_atomically
from .clock import TORCH, Setting, as_deployed, check_runtime, current_setting
from .grid import Grid
from .measure import count_macs, fingerprint, samples_of, time_dense, time_pieces
from .spread import differ


class LatencyTable:
    """Milliseconds by widths, for one setting.

    Attributes:
        parts: what the model consists of.
        grids: milliseconds of one piece by its widths, for every part by name.
        at: where the widths of every piece are found in `widths.reshape(-1)`, `(pieces, axes)`, by part.
        dense: the blocks of the model it was made for.
        dense_ms: their latency by this table.
        setting: device, mode, dtype, batch, tokens, threads and versions it was measured with; None for an analytic
            table.

    Raises:
        ValueError: parts that do not fit the blocks, or leave out a width.

    >>> model = nvit.load(nvit.BUNDLED)
    >>> table = nvit.LatencyTable.analytic(model)  # or LatencyTable.measure(model, batch_size=64)
    >>> half = [dataclasses.replace(block, mlp=block.mlp // 2) for block in table.dense]
    >>> round(table.ratio(half), 2)
    0.68
    >>> table.save("table.json")
    >>> nvit.LatencyTable.load("table.json")
    LatencyTable(4 blocks, 0.003495 GMACs an image, counted and not measured)
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
        there = width_array(self.dense)
        there *= there[:, 1:].any(1, keepdims=True)  # a block of which all has left asks nothing of its stream
        left_out = set(there.reshape(-1).nonzero()[0].tolist()).difference(*(at.flat for at in self.at.values()))
        if left_out:
            block, kind = divmod(min(left_out), len(KINDS))
            raise ValueError(f"no part of the latency table depends on {KINDS[kind]} of block {block}")
        self.dense_ms = self.model_ms(self.dense)

    def __repr__(self) -> str:
        s, size = self.setting, f"{len(self.dense)} blocks"
        if s is None:
            return f"LatencyTable({size}, {self.dense_ms:.4g} GMACs an image, counted and not measured)"
        return f"LatencyTable({size}, {self.dense_ms:.4g} ms for {s.batch_size} images; {s.in_words})"

    def _repr_html_(self) -> str:
        unit, slopes = ("GMACs" if self.setting is None else "ms"), self.slopes()
        saved = [(TITLES[kind], f"{slopes[f'ms_per_{kind}']:.3g}") for kind in KINDS]
        return html.line(repr(self)) + html.table(("width", f"{unit} saved by a unit"), saved)

    def ms(self, widths: np.ndarray) -> float:
        """Milliseconds of a model whose blocks have `widths` `(blocks, 5)`, in the order of `KINDS`. A piece of which a
        width is 0 has left, and takes no time."""
        flat, total = widths.reshape(-1), 0.0
        for name, at in self.at.items():
            found = flat[at]
            found = found[(found > 0).all(1)]
            total += self.grids[name](found).sum() if len(found) else 0.0
        return float(total)

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
            for field in ("device", "runtime", "mode", "dtype", "batch_size", "tokens", "threads"):
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
        """What `save` writes, as text."""
        parts = {
            p.name: {"kinds": p.kinds, "pieces": p.pieces, "axes": g.axes, "values": g.values.tolist()}
            | ({} if p.tokens is None else {"tokens": p.tokens, "merged": p.merged})
            for p, g in ((p, self.grids[p.name]) for p in self.parts)
        }
        setting = None if self.setting is None else asdict(self.setting)
        dense = [asdict(b) for b in self.dense]
        return json.dumps({"unit": "ms", "setting": setting, "dense": dense, "parts": parts}) + "\n"

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `load` reads; it is either whole or not there."""
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
                parts.append(
                    Part(name, tuple(p["kinds"]), tuple(map(tuple, p["pieces"])), p.get("tokens"), p.get("merged", 0))
                )
                grids[name] = Grid(p["kinds"], p["axes"], p["values"])
            setting = None if raw["setting"] is None else Setting(**raw["setting"])
            return cls(parts, grids, [BlockWidths(**b) for b in raw["dense"]], setting)
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            reason = f"{type(e).__name__}: {e}"
            raise ValueError(f"{path} is not a latency table ({reason}); make one with `nvit latency`") from None

    @classmethod
    def analytic(cls, model: nn.Module, bundle_sizes: Mapping[str, int] = BUNDLE_SIZES) -> LatencyTable:
        """A table of multiply-accumulates, 1 GMAC an image counted as 1 ms: for tests, and machines that are not here.

        Exact, since MACs are multilinear in the widths.
        """
        samples = samples_of(model, bundle_sizes)
        return cls(samples.parts, count_macs(samples), samples.dense, None)

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        batch_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        *,
        mode: str | None = None,
        runtime: str = TORCH,
        bundle_sizes: Mapping[str, int] = BUNDLE_SIZES,
        seconds: float = 40.0,
        cache: Path | None = None,
    ) -> LatencyTable:
        """Measure a table for `model` (dense or compact; unchanged) on this device, in about `seconds`.

        The first calls count: where they leave no time for the whole grid it is made coarser, see `measure.COARSER`.

        Args:
            dtype: parameters' and inputs', as `torch.bfloat16` or `"bfloat16"`; bfloat16 on CUDA and float32 elsewhere
                when None.
            mode: `graph` (replays of CUDA graphs), `eager` or `compile`; graph on CUDA and eager elsewhere when None.
            runtime: `torch`, or where pieces are exported to and timed: `onnxruntime`, `openvino`, on the CPU.
            cache: a folder; a table measured there for the same model shape and setting is used again, unless the
                dense model takes another time now than it took then.

        Raises:
            ValueError: an unsupported model, or a mode that this device has not.

        >>> model = nvit.load(nvit.BUNDLED)
        >>> table = nvit.LatencyTable.measure(model, batch_size=2, seconds=0.1)
        >>> table.setting.batch_size, table.setting.dtype
        (2, 'float32')
        """
        device = torch.device(device)
        mode, dtype = as_deployed(device, mode, dtype)
        check_runtime(runtime, device, mode, dtype)
        samples = samples_of(model, bundle_sizes)
        setting = current_setting(device, dtype, batch_size, samples.adapter.tokens(samples.skeleton), mode, runtime)
        whole, coarse = (f"{fingerprint(samples, setting)}{end}.json" for end in ("", f"-{seconds:g}s"))
        paths = () if cache is None else (cache / whole, cache / coarse)
        if (found := next((path for path in paths if path.exists()), None)) is not None:
            table = cls.load(found)
            if not differ(time_dense(samples, batch_size, device, dtype, seconds / 20, mode, runtime), table.dense_ms):
                return table
        grids, dense_ms = time_pieces(samples, batch_size, device, dtype, seconds, mode, runtime)
        # Pieces timed alone add up to a little more or less than the model; the table speaks for the model.
        scale = dense_ms / cls(samples.parts, grids, samples.dense, setting).dense_ms
        scaled = {name: Grid(g.kinds, g.axes, g.values * scale) for name, g in grids.items()}
        table = cls(samples.parts, scaled, samples.dense, setting)
        if cache is not None:
            every = [grids[part.name].axes for part in samples.parts] == list(samples.axes())
            # A coarse one serves whoever has no more time.
            table.save(cache / (whole if every else coarse))
        return table


def default_cache() -> Path:
    """Where measured tables are kept."""
    return cache_folder() / "latency"


def width_array(blocks: Sequence[BlockWidths]) -> np.ndarray:
    """Widths `(blocks, 5)` in the order of `KINDS`."""
    return np.array([[getattr(b, kind) for kind in KINDS] for b in blocks])


def _at(part: Part, depth: int) -> np.ndarray:
    """Where the widths of each piece lie in a flat array of widths, `(pieces, axes)`."""
    pieces = np.array(part.pieces, dtype=int)
    if pieces.shape[1:] != (len(part.kinds),) or pieces.min() < 0 or pieces.max() >= depth:
        raise ValueError(f"every piece of {part.name} has to name one of {depth} blocks per axis ({part.kinds})")
    return pieces * len(KINDS) + [KINDS.index(kind) for kind in part.kinds]
