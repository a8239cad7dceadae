"""Blocks that run in turn and merge tokens on the way: what goes from one to the next beside the stream."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional

Merged = tuple[Tensor | None, Tensor | None]
"""How many tokens of the input each stands for, float32 `(batch, left)`, and where each of the input's tokens went,
int64 `(batch, tokens)`; None while nothing has merged."""

NOTHING: Merged = (None, None)


class MergingStack(nn.Sequential):
    """Blocks called in turn as `block(x, merged)`, each of which gives `(x, sizes, place)`. At the end every token is
    back at its place, as the mean that it went into: whoever reads the output (a pooling, a dense head) finds as many
    tokens as came in, and a mean over them weighs each by its size."""

    def forward(self, x: Tensor) -> Tensor:
        merged = NOTHING
        for block in self:
            x, *state = block(x, merged)
            merged = tuple(state)
        return x if merged[1] is None else functional.unmerge_tokens(x, merged[1])


def merge(x: Tensor, keys: Tensor | None, merged: Merged, r: int, prefix: int) -> tuple[Tensor, Merged]:
    """One block's merge of `r` tokens by their keys `(batch, heads, tokens, dim)`; none where `r` is 0."""
    if not r:
        return x, merged
    if keys is None:
        raise ValueError("a block whose attention has left merges tokens, but its keys would say which are alike")
    sizes, before = merged
    x, sizes, place = functional.merge_tokens(x, keys, sizes, r, prefix)
    return x, (sizes, place if before is None else place.gather(1, before))


def alone() -> ValueError:
    """Of a block of a `MergingStack` that somebody calls without what the others merged."""
    return ValueError(
        "a block of a model that merges tokens was called alone (by forward_intermediates, gradient checkpointing or "
        "an attention mask), but it needs what the blocks before it merged; call the whole model, or end the merging "
        "first (nvit.adapters.merge_(model, ()))"
    )


def counts(tokens: int, merges: tuple[int, ...]) -> list[int]:
    """Tokens that enter every block, and last those that leave the last one."""
    found = [tokens]
    for r in merges:
        found.append(found[-1] - r)
    return found


def check_merges(merges: tuple[int, ...], blocks: int, tokens: int, prefix: int) -> None:
    """Raise ValueError unless so many tokens can merge in the blocks of a model."""
    if len(merges) != blocks:
        raise ValueError(f"merges name {len(merges)} blocks of a model of {blocks}")
    if (i := impossible(merges, tokens, prefix)) is not None:
        left = counts(tokens, merges[:i])[-1]
        raise ValueError(
            f"block {i} merges {merges[i]} of {left} tokens; {prefix} never merge, and of the others at most "
            f"{max(0, left - prefix) // 2}"
        )


def impossible(merges: tuple[int, ...], tokens: int, prefix: int) -> int | None:
    """The first block that would merge more than half of the tokens that may and are left to it, or no whole number of
    them; None where all can."""
    left = tokens - prefix
    for i, r in enumerate(merges):
        if type(r) is not int or not 0 <= r <= max(0, left) // 2:
            return i
        left -= r
    return None
