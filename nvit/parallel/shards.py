"""Weights in shards over all ranks (FSDP2)."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .. import adapters
from ..structure import masks
from .collectives import sums
from .process import main, rank, world


class Call(nn.Module):
    """`function(model, images)` as a module's own call, which is where DDP and FSDP act."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, images: Tensor) -> Any:
        return self.function(self.model, images)


def shard(model: nn.Module, function: Callable[[nn.Module, Tensor], Any]) -> Call:
    """`function` on a twin of `model` whose parameters lie in shards over all ranks (FSDP2), gathered block by block.

    `model` itself is hollow from now on: its parameters keep their shapes but hold nothing, until `fill_`.
    """
    twin = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
    mesh = init_device_mesh(next(model.parameters()).device.type, (world(),))
    for block in adapters.of(twin).blocks(twin):
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


def projection(params: Mapping[str, Tensor], weights: masks.WeightMasks) -> Callable[[], None]:
    """`masks.Projection` of these parameters, which may lie in shards, as a function of nothing."""
    mine = {}
    for name, dims in weights.items():
        p = params[name]
        if isinstance(p, DTensor) and dims[0] is not None:
            dims = (dims[0][slice(*_rows(p))], *dims[1:])
        mine[name] = dims
    zero = masks.Projection({name: _local(params[name]) for name in weights}, mine)
    return lambda: zero({name: _local(params[name].detach()) for name in weights})


def project_(params: Mapping[str, Tensor], weights: masks.WeightMasks) -> None:
    """`masks.project_` where parameters may lie in shards."""
    projection(params, weights)()


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
