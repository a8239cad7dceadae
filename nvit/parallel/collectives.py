"""What ranks share: batches, sums, means, words from rank 0, and whether they agree."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .process import main, rank, world

T = TypeVar("T")


def share(size: int) -> list[int]:
    """This rank's positions in a batch of `size`, ascending. Shares are disjoint and together the batch.

    Positions i and size - 1 - i go to the same rank: mixup and cutmix mix just these, so that on shares they make the
    images they would make of the whole batch. What an odd batch has left over ends the last rank's share.

    Raises:
        ValueError: fewer than two images a rank.
    """
    mine, count = rank(), world()
    if count == 1:
        return list(range(size))
    pairs = size // 2
    if pairs < count:
        raise ValueError(f"a batch of {size} is too small for {count} ranks; give --batch-size {2 * count} or more")
    first, last = pairs * mine // count, pairs * (mine + 1) // count
    left_over = [size - 1] if size % 2 and mine == count - 1 else []
    return [*range(first, last), *range(2 * pairs - last, 2 * pairs - first), *left_over]


def take(batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """This rank's share of a batch that every rank has in full."""
    if world() == 1:
        return tuple(batch)
    return tuple(t[share(len(t))] for t in batch)


def sums(values: Sequence[Tensor | float], device: torch.device) -> list[float]:
    """Each number summed over ranks."""
    if world() == 1:
        return [float(v) for v in values]
    total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])
    dist.all_reduce(total)
    return total.tolist()


def mean(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor's mean over ranks, in one message a dtype."""
    if world() == 1:
        return dict(tensors)
    out = {}
    for dtype in dict.fromkeys(t.dtype for t in tensors.values()):
        mine = {n: t for n, t in tensors.items() if t.dtype == dtype}
        flat = torch.cat([t.flatten() for t in mine.values()])
        dist.all_reduce(flat)
        parts = flat.div_(world()).split([t.numel() for t in mine.values()])
        out |= {n: part.view(t.shape) for (n, t), part in zip(mine.items(), parts, strict=True)}
    return {n: out[n] for n in tensors}


@torch.no_grad()
def same_weights_(model: nn.Module) -> None:
    """Give every rank rank 0's parameters."""
    if world() > 1:
        for p in model.parameters():
            dist.broadcast(p.data, 0)


def from_main(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, which alone does it, for every rank; if it fails there it fails everywhere."""
    if world() == 1:
        return work()
    word: list[Any] = [None, None]
    if main():
        try:
            word[0] = work()
        except (ValueError, ArithmeticError, OSError) as e:
            word[1] = e
    try:
        dist.broadcast_object_list(word, 0)
    except RuntimeError:
        if word[1] is not None:  # the cause comes before what followed from it
            raise word[1] from None
        raise
    if word[1] is not None:
        raise word[1]
    return word[0]


def agree(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that every rank holds the same bits.

    Raises:
        ValueError: some do not; names `what` and the ranks that differ from rank 0.
    """
    if world() == 1:
        return
    check = 0
    for name in sorted(tensors):
        check = zlib.crc32(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), check)
    checks: list[Any] = [None] * world()
    dist.all_gather_object(checks, check)
    others = [r for r, c in enumerate(checks) if c != checks[0]]
    if others:
        raise ValueError(
            f"{what} differs between ranks: {', '.join(map(str, others))} have not what rank 0 has (checksums "
            f"{', '.join(f'{c:08x}' for c in checks)}). Give all ranks the same batches, hardware and libraries."
        )
