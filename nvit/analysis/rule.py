"""The ReViT-like rule that fits pruned models (arXiv:2110.04869, Sec. 5.4), and how widths go with the stream's (its
insight 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from ..spec import BlockWidths
from ..zoo import Rule

SCALED = ("heads", "qk_dim", "mlp")
"""The widths that go with the stream's in the paper's rule; V stays what it is."""

FACTORS = (1 / 8, 8.0)
"""Between which the middle's factor is looked for."""


def fit(models: Sequence[Sequence[BlockWidths]]) -> tuple[Rule, dict[str, float]]:
    """The rule nearest to the widths of all models together, and the share of each width's variance that it explains.

    Every span of blocks is tried as the middle. For each, the factor and the widths per channel are those of least
    squared error of heads, qk_dim and mlp over the stream's width, each error as a share of its mean.

    Returns:
        The rule, and by width of `SCALED` R² of width over stream; 1 where it is the same everywhere.

    Raises:
        ValueError: models of different depths, or of fewer than three blocks.
    """
    depths = {len(blocks) for blocks in models}
    if len(depths) != 1:
        raise ValueError(f"the models have {sorted(depths)} blocks; a rule is fitted to models of one depth")
    (depth,) = depths
    if depth < 3:
        raise ValueError(f"the models have {depth} blocks; a rule with a middle needs three")
    shares = {k: np.array([[getattr(b, k) / b.emb for b in blocks] for blocks in models]) for k in SCALED}

    def per_channel(factor: float, inside: np.ndarray) -> tuple[dict[str, float], float]:
        m = np.where(inside, factor, 1.0)
        slopes = {k: float((x * m).sum() / (len(x) * (m * m).sum())) for k, x in shares.items()}
        return slopes, sum(float(((x - slopes[k] * m) ** 2).mean() / x.mean() ** 2) for k, x in shares.items())

    best: tuple[float, float, tuple[int, int]] | None = None
    for first in range(depth):
        for end in range(first + 1, depth + 1):
            if end - first == depth:
                continue
            inside = (np.arange(depth) >= first) & (np.arange(depth) < end)
            bounds = tuple(math.log(f) for f in FACTORS)
            found = minimize_scalar(
                lambda f, inside=inside: per_channel(math.exp(f), inside)[1], bounds=bounds, method="bounded"
            )
            if best is None or found.fun < best[0] - 1e-12:
                best = (float(found.fun), math.exp(found.x), (first, end))
    _, factor, middle = best
    inside = (np.arange(depth) >= middle[0]) & (np.arange(depth) < middle[1])
    slopes, _ = per_channel(factor, inside)
    m, explained = np.where(inside, factor, 1.0), {}
    for k, x in shares.items():
        spread = ((x - x.mean()) ** 2).sum()
        explained[k] = 1.0 if spread == 0 else float(1 - ((x - slopes[k] * m) ** 2).sum() / spread)
    v_dim = 8 * max(1, round(float(np.mean([b.v_dim for blocks in models for b in blocks])) / 8))
    return Rule(v_dim=v_dim, factor=factor, middle=middle, of=depth, **slopes), explained


def in_words(rule: Rule) -> str:
    """The rule on one line, for people."""
    scaled = ", ".join(f"{k} = {getattr(rule, k):.3g}·emb" for k in SCALED)
    first, end = rule.middle
    where = f"block {first + 1}" if end == first + 1 else f"blocks {first + 1} to {end}"
    return f"{scaled}, v_dim = {rule.v_dim}; times {rule.factor:.2f} in {where} of {rule.of}, but for v_dim"


def slopes(models: Mapping[str, Sequence[BlockWidths]]) -> list[dict[str, Any]]:
    """Insight 1, block by block: how heads, QK and MLP go with the stream's width over several models.

    Returns:
        A row per block and width: `slope` of the line through the origin of least squared error, in units a channel,
        and `r2` about the mean, None where the models' streams or widths are all the same.

    Raises:
        ValueError: models of different depths.
    """
    if len({len(blocks) for blocks in models.values()}) > 1:
        raise ValueError("the models have different numbers of blocks; slopes are of models of one depth")
    rows = []
    for block, widths in enumerate(zip(*models.values(), strict=True)):
        emb = np.array([w.emb for w in widths], dtype=float)
        for kind in SCALED:
            y = np.array([getattr(w, kind) for w in widths], dtype=float)
            slope, spread = float((emb @ y) / (emb @ emb)), float(((y - y.mean()) ** 2).sum())
            told = len(set(emb)) > 1 and spread > 0
            r2 = 1 - float(((y - slope * emb) ** 2).sum()) / spread if told else None
            rows.append({"block": block, "kind": kind, "slope": slope, "r2": r2})
    return rows
