"""Alike tokens merged into their weighted means, in plain torch: the definition, and what runs where kernels do not.

Only rows are moved that have to be: what is kept is copied once, as whole rows, and only the rows that others merge
into are touched again. There is no loop over images and no shape that depends on values, so that it exports.
"""

from __future__ import annotations

from operator import sub

import torch
from torch import Tensor


def merge_tokens(
    x: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge `r` tokens of every image into others that have the most similar keys (ToMe, arXiv:2210.09461).

    Tokens behind the prefix are taken in turn as even and odd ones. Every even token has one partner, the odd token of
    the most similar key (cosine of the mean over heads). The `r` even tokens that are nearest to their partners merge
    into them, each weighted by how many tokens of the input it stands for. Of equal similarities the earlier token
    counts as nearer. The tokens that are left keep their order.

    Args:
        x: `(batch, tokens, width)`.
        keys: `(batch, heads, tokens, dim)`. Similarities are float32 whatever comes in, and have no gradient.
        sizes: how many tokens each stands for, float32 `(batch, tokens)`; None for one each.
        r: how many merge, the same for every image; 0 for none.
        prefix: so many tokens at the front never merge: class, distillation and register tokens.

    Returns:
        The tokens `(batch, tokens - r, width)`, their sizes `(batch, tokens - r)` in float32, and for every token that
        came in where among them it is, int64 `(batch, tokens)`; see `unmerge_tokens`.

    Raises:
        ValueError: shapes disagree, or `r` is more than half of the tokens behind the prefix.
    """
    check(x, keys, sizes, r, prefix)
    batch, tokens, width = x.shape
    sizes = x.new_ones(batch, tokens, dtype=torch.float32) if sizes is None else sizes
    with torch.no_grad():
        source, into = match(keys, r, prefix)
        every = torch.arange(tokens, device=x.device).expand(batch, -1)
        leaves = torch.zeros_like(every).scatter(1, source, 1)
        place = every - leaves.cumsum(1)  # right for those that stay; a source goes where its partner is
        target = place.gather(1, into)
        place = place.scatter(1, source, target)
        # Where each row of the output comes from. Sources are written to one place more, which is cut off again.
        slots = place.scatter(1, source, tokens - r)
        stays = torch.empty_like(every).scatter(1, slots, every)[:, : tokens - r]
    first = torch.arange(batch, device=x.device)[:, None]
    rows, moved = x.flatten(0, 1), sizes.gather(1, source)
    out = rows.index_select(0, (stays + first * tokens).flatten())
    total = sizes.gather(1, stays).scatter_add(1, target, moved)
    if r:
        # A mean as a step from the partner towards each source: tokens that nothing merges into stay as they are.
        share = (moved / total.gather(1, target)).to(x.dtype)
        ends = (rows.index_select(0, (t + first * tokens).flatten()) for t in (source, into))
        out.index_add_(0, (target + first * (tokens - r)).flatten(), sub(*ends) * share.reshape(-1, 1))
    return out.view(batch, tokens - r, width), total, place


def match(keys: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Which tokens leave, and which ones they merge into, both int64 `(batch, r)`; nearest pairs first.

    Args:
        keys: `(batch, heads, tokens, dim)`.
    """
    total, *more = keys.detach()[:, :, prefix:].float().unbind(1)  # head by head: three times as fast as one sum
    for head in more:
        total = total + head
    mean = total / torch.linalg.vector_norm(total, dim=-1, keepdim=True).clamp(min=1e-12)
    likeness = mean[:, ::2] @ mean[:, 1::2].mT
    nearness, partner = likeness.max(-1) if r else (mean[:, ::2, 0], None)
    chosen = nearest_first(nearness)[:, :r]
    partner = chosen if partner is None else partner.gather(1, chosen)
    return prefix + 2 * chosen, prefix + 1 + 2 * partner


def nearest_first(nearness: Tensor) -> Tensor:
    """Indices `(batch, tokens)` by descending nearness, the earlier of equals first."""
    if not torch.compiler.is_compiling():
        return nearness.sort(dim=-1, descending=True, stable=True).indices
    # ONNX has no stable sort: a rank is how many come before, and the order of ranks is their inverse.
    mine, others = nearness[:, :, None], nearness[:, None, :]
    index = torch.arange(nearness.shape[1], device=nearness.device)
    before = (others > mine) | ((others == mine) & (index[None, :] < index[:, None]))
    return torch.zeros_like(nearness, dtype=torch.int64).scatter(1, before.sum(-1), index.expand_as(nearness))


def unmerge_tokens(x: Tensor, place: Tensor) -> Tensor:
    """Every token back at its place, as the mean it went into.

    Args:
        x: `(batch, left, width)`.
        place: of each of the tokens there were, which one of `x` it is, int64 `(batch, tokens)`.

    Returns:
        `(batch, tokens, width)`.
    """
    batch, left, width = x.shape
    first = torch.arange(batch, device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, (place + first * left).flatten()).view(batch, -1, width)


def check(x: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int) -> None:
    """Raise ValueError unless the arguments of `merge_tokens` fit each other."""
    tokens = x.shape[1]
    if keys.dim() != 4 or (keys.shape[0], keys.shape[2]) != (x.shape[0], tokens):
        raise ValueError(f"keys are {tuple(keys.shape)}, expected (batch, heads, tokens, dim) for x {tuple(x.shape)}")
    if sizes is not None and sizes.shape != x.shape[:2]:
        raise ValueError(f"sizes are {tuple(sizes.shape)}, expected (batch, tokens) of x {tuple(x.shape)}")
    most = max(0, tokens - prefix) // 2
    if not 0 <= r <= most:
        raise ValueError(
            f"{r} of {tokens} tokens cannot merge: {prefix} never do, and of the others half at most ({most})"
        )
