"""How far a latency table is off: models of random widths, predicted and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import adapters
from ..latency.clock import TORCH
from ..latency.table import LatencyTable
from ..spec import BUNDLE_SIZES, Group
from ..structure.compact import compact
from ..structure.masks import Masks, full_masks
from ..utils.progress import Progress, silent
from ..utils.style import ACCENT, BEHIND, INK
from .compare import measured, predicted_ratio
from .figure import PIXELS, panels, whole_numbers


def random_masks(groups: Sequence[Group], generator: torch.Generator) -> Masks:
    """Masks that leave a random number of bundles of every group, at least one; which units is left to chance.

    The number is drawn about a share that all groups of a model have in common, so that models of all latencies come
    up: of widths drawn each by itself the sum would always be the same.
    """
    masks, share = full_masks(groups), float(torch.rand((), generator=generator))
    for g in groups:
        bundles = -(-g.size // g.multiple)
        drawn = (share + float(torch.rand((), generator=generator))) / 2
        kept = min(g.size, max(1, round(drawn * bundles)) * g.multiple)
        leave = torch.randperm(g.size, generator=generator)[kept:]
        masks[g.name][leave] = False
    return masks


def predicted_and_measured(
    model: nn.Module,
    table: LatencyTable,
    images: Tensor,
    *,
    count: int,
    seconds: float,
    mode: str = "eager",
    runtime: str = TORCH,
    bundle_sizes: Mapping[str, int] = BUNDLE_SIZES,
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, float]]:
    """A row for each of `count` models of random widths cut from a prepared one, timed in turn with it: fractions of
    its latency `predicted_ratio` and `measured_ratio` with `measured_spread`, and `error`, the first over the second
    less 1. Two models are in memory at a time.

    Args:
        images: what is timed, in its dtype.
        seconds: of measuring, all together.
    """
    groups = adapters.find(model).groups(model, bundle_sizes)
    generator, rows = torch.Generator().manual_seed(seed), []
    for done in range(1, count + 1):
        small = compact(model, groups, random_masks(groups, generator))
        found = measured([model, small], images, seconds / count, mode, runtime)[1]
        ratio = {"predicted_ratio": predicted_ratio(table, small)}
        row = ratio | {key: found[key] for key in ("measured_ratio", "measured_spread")}
        rows.append(row | {"error": row["predicted_ratio"] / row["measured_ratio"] - 1})
        progress(done, count, "measuring models")
    return rows


def errors(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """In percent of what was measured: the `mean` error, and of its size `median`, `p90` and `largest`."""
    off = 100 * np.array([r["error"] for r in rows])
    size = np.abs(off)
    named = {"median": np.median(size), "p90": np.quantile(size, 0.9), "largest": size.max()}
    return {"mean": float(off.mean())} | {key: float(value) for key, value in named.items()}


def plot(rows: Sequence[Mapping[str, float]], path: Path | str, pixels: int = PIXELS) -> None:
    """Measured over predicted, each with how far the clock may be off, and how often the table was off by how much."""
    found = errors(rows)
    off = f"off by {found['median']:.1f} % (median), {found['largest']:.1f} % at most"
    title = f"{len(rows)} models of random widths: {off}"
    with panels(2, path, pixels=pixels, width=2.9, height=2.9, title=title) as (left, right):
        predicted, measured = ([r[key] for r in rows] for key in ("predicted_ratio", "measured_ratio"))
        most = 1.08 * max(*predicted, *measured)
        left.plot([0, most], [0, most], color=BEHIND)
        left.errorbar(predicted, measured, [r["measured_spread"] for r in rows], fmt="o", color=ACCENT, markersize=3.5)
        left.set(xlabel="predicted, of the dense latency", ylabel="measured", xlim=(0, most), ylim=(0, most))
        right.hist([100 * r["error"] for r in rows], bins=min(20, max(5, len(rows) // 3)), color=ACCENT)
        right.axvline(0, color=INK, linestyle=":")
        whole_numbers(right.yaxis)
        right.set(xlabel="predicted over measured, %", ylabel="models")
