"""Several models side by side: size, latency measured in turn, and what a latency table foretold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .. import adapters
from ..latency.clock import TORCH, in_dtype, time_rounds
from ..latency.spread import ratio_to_first, typical
from ..latency.table import LatencyTable
from ..prune.tokens import work_of
from ..spec import BUNDLE_SIZES, KINDS
from ..structure import snapshot
from .evaluate import macs, parameters


def size(model: nn.Module) -> dict[str, int]:
    """`params`, and `macs` (multiply-accumulates) of one image."""
    return {"params": parameters(model), "macs": macs(model, adapters.preprocess(model)["input_size"])}


def measured(
    models: Sequence[nn.Module], images: Tensor, seconds: float, mode: str = "eager", runtime: str = TORCH
) -> list[dict[str, float]]:
    """A row per model, timed in turn on `images` and in their dtype: `measured_ratio`, of the first one's latency,
    with its `measured_spread`, `latency_ms` and `images_per_s`."""
    where = () if runtime == TORCH else (runtime,)
    rounds = time_rounds([in_dtype(m, images.dtype) for m in models], images, seconds, mode, *where)
    rows = []
    for i, ms in enumerate(typical(rounds).tolist()):
        ratio = ratio_to_first(rounds, i)
        row = {"measured_ratio": ratio.value, "measured_spread": ratio.spread}
        rows.append(row | {"latency_ms": ms, "images_per_s": 1e3 * len(images) / ms})
    return rows


def predicted_ratio(table: LatencyTable, model: nn.Module) -> float | None:
    """The table's word on a dense or compact model, where it reaches that far: none on merged tokens, unless it counts
    operations."""
    spec = snapshot.spec_of(model)
    if spec.merges and table.setting is not None:
        return None
    try:
        return work_of(model)(spec.merges) / (1e9 * table.dense_ms) if spec.merges else table.ratio(spec.blocks)
    except ValueError:
        return None


def smallest_bundles(models: Sequence[nn.Module]) -> dict[str, int]:
    """Bundle sizes by kind whose table begins at or below the narrowest width of any model."""
    blocks = [b for m in models for b in snapshot.spec_of(m).blocks]
    return {kind: min(BUNDLE_SIZES[kind], *(getattr(b, kind) for b in blocks)) for kind in KINDS}


def side_by_side(
    models: Sequence[nn.Module],
    table: LatencyTable,
    images: Tensor,
    seconds: float,
    mode: str = "eager",
    runtime: str = TORCH,
) -> list[dict[str, Any]]:
    """A row per model: `size`, `predicted_ratio`, `measured`, and `speedup` over the first."""
    rows = []
    for model, times in zip(models, measured(models, images, seconds, mode, runtime), strict=True):
        row = size(model) | {"predicted_ratio": predicted_ratio(table, model)} | times
        rows.append(row | {"speedup": 1 / times["measured_ratio"]})
    return rows
