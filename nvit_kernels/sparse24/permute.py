"""An order of input channels that lets 2:4 sparsity keep more.

Which channels are neighbours decides which weights compete for the two places of a group. Units that only pass from one
layer to the next (the MLP's hidden units, the V dims inside a head) can be reordered freely: the columns of the reader
and the rows of the writer move together and the function stays the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from nvit_kernels import _native
from nvit_kernels.sparse24.compress import mask_2to4

# The 35 ways to cut eight channels into two groups of four: those with channel 0, and what they leave.
_SPLITS = [(s, tuple(c for c in range(8) if c not in s)) for s in combinations(range(8), 4) if 0 in s]
_PAIRS = {pair: i for i, pair in enumerate(combinations(range(8), 2))}


@dataclass(frozen=True)
class ChannelOrder:
    """What a search found.

    Attributes:
        order: int64 `(K,)`; channel `order[i]` moves to place i. Apply as `reader.weight[:, order]`,
            `writer.weight[order]`, `writer.bias[order]`.
        kept_before, kept_after: the part of the sum of magnitudes that 2:4 keeps, in the given order and in this one.
        rounds: how often every group met another.
        settled: no exchange between any two groups keeps more.
        seconds: time taken.
    """

    order: Tensor
    kept_before: float
    kept_after: float
    rounds: int
    settled: bool
    seconds: float


def kept_fraction(weights: Tensor | Sequence[Tensor], order: Tensor | None = None) -> float:
    """The part of the sum of magnitudes that 2:4 keeps, by the rule of `compress_2to4`."""
    rows = _rows(weights)
    rows = rows if order is None else rows[:, order]
    return float((rows.abs() * mask_2to4(rows)).sum(dtype=torch.float64) / rows.abs().sum(dtype=torch.float64))


def search_channel_order(
    weights: Tensor | Sequence[Tensor],
    *,
    span: int | None = None,
    seconds: float = 10.0,
    rounds: int | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> ChannelOrder:
    """Search an order of the columns of `weights` under which 2:4 keeps the most magnitude.

    Groups of four meet in pairs, all pairs in turn as in a tournament; when two meet, the best of the 35 ways to share
    out their eight channels is taken. Every exchange keeps more than before, so the result is never worse than the
    given order. The search ends when no two groups have anything to exchange, or at the bound.

    Args:
        weights: `(M, K)` matrices that read the same K channels (tensors or arrays); K a multiple of 4.
        span: channels move only within each run of this many (V dims inside a head: the head's V width); a multiple
            of 4 that divides K. By default they move freely.
        seconds: bound on the time.
        rounds: bound on the rounds; with it instead of the time, the result is the same on every machine.
        progress: called after each round with the fraction of the bound used and the kept fraction so far.

    Raises:
        ValueError: matrices that do not share K, or a K or span that does not fit.
    """
    begin = time.monotonic()
    rows = _rows(weights)
    channels = rows.shape[1]
    span = channels if span is None else span
    if span <= 0 or span % 4 or channels % span:
        raise ValueError(
            f"search_channel_order: span {span} does not fit {channels} channels; a multiple of 4 that divides."
        )
    magnitudes = rows.abs().t().contiguous()  # a channel a row, so that one channel's weights lie together
    total = float(magnitudes.sum(dtype=torch.float64)) or 1.0
    order = _best_start(magnitudes, span)
    given = _kept(magnitudes, torch.arange(channels)) / total

    kept = _kept(magnitudes, order)
    groups = span // 4
    unchanged, done, settled = 0, 0, groups < 2
    for done in range(1, 1 + (0 if settled else rounds or 10**9)):
        gain = _meet(magnitudes, order, _meetings(groups, done, channels // span))
        kept += gain
        unchanged = 0 if gain else unchanged + 1
        elapsed = time.monotonic() - begin
        if progress is not None:
            progress(min(done / rounds if rounds is not None else elapsed / seconds, 1.0), kept / total)
        settled = unchanged >= groups + groups % 2 - 1  # all pairs met and none exchanged
        if settled or (rounds is None and elapsed >= seconds):
            break
    after = _kept(magnitudes, order) / total  # once more from the start: sums of gains round
    return ChannelOrder(order, given, after, done, settled, time.monotonic() - begin)


def _rows(weights: Tensor | Sequence[Tensor]) -> Tensor:
    """All rows that read the channels, as one float32 matrix on the CPU."""
    several = list(weights) if isinstance(weights, (list, tuple)) else [weights]
    matrices = [torch.as_tensor(w).detach().to("cpu", torch.float32) for w in several]
    shapes = [tuple(m.shape) for m in matrices]
    if not matrices or any(m.dim() != 2 or m.shape[1] != matrices[0].shape[1] for m in matrices):
        raise ValueError(f"weights of shapes {shapes} do not read the same channels; give (M, K) matrices of one K.")
    if matrices[0].shape[1] % 4 or not matrices[0].numel():
        raise ValueError(f"weights of shapes {shapes} have a K that is not a multiple of 4.")
    joined = torch.cat(matrices)
    if not joined.isfinite().all():
        raise ValueError("weights hold NaN or infinity, which cannot be ranked. Find the step that made it.")
    return joined


def _top_two(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Sum of the two largest of four, element by element."""
    best_pair = torch.maximum(a + b, c + d)
    return torch.maximum(best_pair, torch.maximum(a, b).add_(torch.maximum(c, d)))


def _kept(magnitudes: Tensor, order: Tensor) -> float:
    return float(_top_two(*magnitudes[order].unflatten(0, (-1, 4)).unbind(1)).sum(dtype=torch.float64))


def _best_start(magnitudes: Tensor, span: int) -> Tensor:
    """The given order, or the channels dealt out by size so that the large ones spread over the groups."""
    channels = magnitudes.shape[0]
    given = torch.arange(channels)
    by_size = magnitudes.sum(1).view(-1, span).argsort(dim=1, descending=True, stable=True)
    dealt = by_size.view(-1, 4, span // 4).transpose(1, 2).reshape(-1, span)
    dealt = (dealt + torch.arange(0, channels, span)[:, None]).flatten()
    return max(given, dealt, key=lambda order: _kept(magnitudes, order))


def _meetings(groups: int, turn: int, spans: int) -> Tensor:
    """Pairs of groups that meet in a turn: one stays and the others move round until all have met."""
    even = groups + groups % 2
    seats = [0, *((i + turn) % (even - 1) + 1 for i in range(even - 1))]
    pairs = [(seats[i], seats[-1 - i]) for i in range(even // 2)]
    pairs = torch.tensor([p for p in pairs if max(p) < groups])  # with an odd number, one group sits out
    return (pairs + torch.arange(spans)[:, None, None] * groups).flatten(0, 1)


def _meet(magnitudes: Tensor, order: Tensor, pairs: Tensor) -> float:
    """Let each pair of groups share out its channels anew, changing `order`; what that gains."""
    places = (pairs[:, :, None] * 4 + torch.arange(4)).flatten(1)  # the eight places of each pair
    scores = _split_scores(magnitudes, order[places])
    best = scores.max(dim=1)
    better = best.values > scores[:, 0] * (1 + 1e-6)  # split 0 leaves things as they are; do not chase rounding
    splits = torch.tensor([a + b for a, b in _SPLITS])[best.indices[better]]
    order[places[better]] = order[places[better]].gather(1, splits)
    return float((best.values - scores[:, 0])[better].sum(dtype=torch.float64))


def _split_scores(magnitudes: Tensor, octets: Tensor) -> Tensor:
    """What each of the 35 splits of each octet of channels keeps: `(P, 8)` -> float32 `(P, 35)`."""
    if _native.load().cpu:
        return torch.ops.nvit._split_scores(magnitudes, octets)
    return _split_scores_in_torch(magnitudes, octets)


def _split_scores_in_torch(magnitudes: Tensor, octets: Tensor) -> Tensor:
    scores = torch.empty(len(octets), len(_SPLITS))
    step = max(1, 2**16 // magnitudes.shape[1])  # small enough that the intermediate results stay in the cache
    for at in range(0, len(octets), step):
        columns = magnitudes[octets[at : at + step]].unbind(1)
        sums = [columns[a] + columns[b] for a, b in _PAIRS]
        largest = [torch.maximum(columns[a], columns[b]) for a, b in _PAIRS]
        for i, halves in enumerate(_SPLITS):
            kept = 0
            for a, b, c, d in halves:
                ab, cd = _PAIRS[a, b], _PAIRS[c, d]
                both = torch.maximum(sums[ab], sums[cd])
                kept = kept + torch.maximum(both, largest[ab] + largest[cd]).sum(1)
            scores[at : at + step, i] = kept
    return scores
