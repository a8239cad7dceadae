"""Several processes as one: ranks, shares of a batch, sums over ranks, weights in shards, the loss of a rank.

The only file that knows `torch.distributed`. In a single process every function is the identity. Collectives are met by
all ranks in the same order; whatever one of them decides alone (time, files, measurements) comes from rank 0.
"""

from __future__ import annotations

import copy
import math
import os
import re
import signal
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from . import masks
from .modules import prunable_layers

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others: longer than rank 0 measures or evaluates, so that only a hang exceeds it."""
LAST_WAIT = timedelta(hours=24)
"""How long the others wait at the end for rank 0, which alone evaluates and writes."""

_store: dist.Store | None = None


class RankLost(ConnectionError):
    """Another rank is gone, so that no collective can be finished."""


# --- who we are -------------------------------------------------------------------------------------------------------


def join() -> None:
    """Join the processes that torchrun started, if it did: gloo on the CPU, nccl on CUDA. Again, it does nothing."""
    global _store
    if dist.is_initialized() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return
    _store, mine, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=_store, rank=mine, world_size=count, timeout=TIMEOUT)


def leave() -> None:
    """Wait for rank 0, which may still be evaluating, and part."""
    if not dist.is_initialized() or _store is None:
        return
    with suppress(RuntimeError):  # whoever is gone already has ended as well
        if main():
            _store.set("nvit/end", "1")
        else:
            _store.wait(["nvit/end"], LAST_WAIT)
        dist.all_reduce(torch.zeros(1))  # rank 0 may be keeping the store that the others have just read
    dist.destroy_process_group()


def launched() -> tuple[int, int]:
    """Rank and number of ranks as the launcher says, before anyone joined; (0, 1) without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many ranks there are; 1 in a single process."""
    return dist.get_world_size() if dist.is_initialized() else 1


def main() -> bool:
    """Whether this process is the one that prints, writes, measures and evaluates."""
    return rank() == 0


def speaks() -> bool:
    """Whether this rank is the first to have something to say about the end of the run: the others keep silent."""
    if _store is None:
        return launched()[0] == 0
    try:
        return _store.add("nvit/said", 1) == 1
    except RuntimeError:  # the launcher took the store with it
        return main()


def own_device(device: torch.device) -> torch.device:
    """This rank's GPU where `device` is `cuda`; other devices are as they are.

    Raises:
        ValueError: more ranks on this machine than GPUs, or one GPU named for all ranks.
    """
    local, several = int(os.environ.get("LOCAL_RANK", 0)), launched()[1] > 1
    if device.type != "cuda" or not several:
        return device
    if device.index is not None:
        raise ValueError(f"device {device} is one GPU for {launched()[1]} ranks; give --device cuda for one each")
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"rank {local} of this machine has no GPU, there are {torch.cuda.device_count()}; start fewer processes"
        )
    return torch.device("cuda", local)


# --- batches ----------------------------------------------------------------------------------------------------------


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


# --- sums and words ---------------------------------------------------------------------------------------------------


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


# --- weights in shards ------------------------------------------------------------------------------------------------


class Call(nn.Module):
    """`function(model, images)` as a module's own call, which is where DDP and FSDP act."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, images: Tensor) -> Any:
        return self.function(self.model, images)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Children of the innermost lists of modules that hold prunable layers."""
    lists = {m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and prunable_layers(m)}
    innermost = [m for m in lists if lists & set(m.modules()) == {m}]
    return [child for m in innermost for child in m if prunable_layers(child)]


def shard(model: nn.Module, function: Callable[[nn.Module, Tensor], Any]) -> Call:
    """`function` on a twin of `model` whose parameters lie in shards over all ranks (FSDP2), gathered block by block.

    `model` itself is hollow from now on: its parameters keep their shapes but hold nothing, until `fill_`.
    """
    twin = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
    mesh = init_device_mesh(next(model.parameters()).device.type, (world(),))
    for block in _blocks(twin):
        fully_shard(block, mesh=mesh)
    call = fully_shard(Call(twin, function), mesh=mesh)
    for p in model.parameters():
        p.data = p.new_empty(1).expand(p.shape)
    return call


def fill_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a hollow model full tensors again."""
    for name, p in model.named_parameters():
        p.data = weights[name].detach()


def full(t: Tensor) -> Tensor:
    """The whole of a tensor that lies in shards; any other as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t


class _Gathered(Mapping[str, Tensor]):
    """Full tensors of shards by name, gathered when they are asked for; the last few are kept."""

    def __init__(self, shards: Mapping[str, Tensor], kept: int = 4) -> None:
        self.shards, self.kept, self.last = shards, kept, OrderedDict()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.last:
            self.last[name] = full(self.shards[name].detach())
            if len(self.last) > self.kept:
                self.last.popitem(last=False)
        return self.last[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)


def gathered(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`tensors` with shards made full one at a time; to be read in the same order on every rank."""
    return _Gathered(tensors) if any(isinstance(t, DTensor) for t in tensors.values()) else tensors


def _rows(t: DTensor) -> tuple[int, int]:
    """First and last row of this rank's shard."""
    assert t.placements == (Shard(0),), f"shards along {t.placements}, expected rows"
    each = math.ceil(t.shape[0] / world())
    return min(rank() * each, t.shape[0]), min((rank() + 1) * each, t.shape[0])


@torch.no_grad()
def project_(params: Mapping[str, Tensor], weights: masks.WeightMasks) -> None:
    """`masks.project_` where parameters may lie in shards."""
    mine = {}
    for name, dims in weights.items():
        p = params[name]
        if isinstance(p, DTensor) and dims[0] is not None:
            dims = (dims[0][slice(*_rows(p))], *dims[1:])
        mine[name] = dims
    masks.project_({name: _local(params[name]) for name in weights}, mine)


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def to_main(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full copies on rank 0's CPU, one gathered after the other; nothing on other ranks."""
    if world() == 1:
        return dict(tensors)
    out = {}
    for name, t in tensors.items():
        whole = full(t.detach())
        if main():
            out[name] = whole.cpu()
    return out


def like(t: Tensor, param: Tensor) -> Tensor:
    """A full tensor as its parameter lies: this rank's shard of it, or `t` as it is."""
    if not isinstance(param, DTensor) or t.shape != param.shape:
        return t
    return distribute_tensor(t.to(param.device), param.device_mesh, param.placements, src_data_rank=None)


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers are finite, on every rank."""
    norms = torch._foreach_norm([_local(t) for t in tensors])
    bad = not all(bool(torch.isfinite(n)) for n in norms)
    if any(isinstance(t, DTensor) for t in tensors):
        bad = bool(sums([float(bad)], norms[0].device)[0])
    return not bad


# --- the loss of a rank -----------------------------------------------------------------------------------------------

_LOSS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "process group", "processgroup")


@contextmanager
def watch() -> Iterator[None]:
    """Failed collectives inside are `RankLost`."""
    try:
        yield
    except RuntimeError as e:
        text = str(e)
        if world() == 1 or not (isinstance(e, dist.DistError) or any(word in text.lower() for word in _LOSS)):
            raise
        cause = re.sub(r"^\[[^]]*\] *", "", text.splitlines()[0]).partition(". ")[0]
        raise RankLost(
            f"rank {rank()} lost another of {world()} ranks ({cause}); the same command with --resume goes on, with "
            "any number of ranks"
        ) from e


class Ending:
    """Whether the launcher has asked rank 0 to end (SIGTERM), which it does when another rank is gone.

    The signal is only noted, so that the run state can still be written: a launcher gives half a minute for that.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Ending:
        self.before = None
        if world() > 1 and main():
            try:
                self.before = signal.signal(signal.SIGTERM, self._note)
            except ValueError:  # not in the main thread: the signal keeps its default
                self.before = None
        return self

    def _note(self, *_: Any) -> None:
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def check(self) -> None:
        """Raise RankLost if the end was asked for."""
        if self.asked:
            raise RankLost("the launcher ends the run (SIGTERM); the same command with --resume goes on")
