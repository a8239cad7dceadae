"""Several processes as one: ranks, shares of a batch, sums over ranks, weights in shards, the loss of a rank.

The only room that knows `torch.distributed`. In a single process every function is the identity. Collectives are met by
all ranks in the same order; whatever one of them decides alone (time, files, measurements) comes from rank 0.
"""

from .collectives import agree, from_main, mean, same_weights_, share, sums, take
from .failures import Ending, RankLost, watch
from .process import join, launched, leave, main, own_device, rank, speaks, world
from .shards import Call, fill_, finite, full, gathered, like, project_, projection, shard, to_main

__all__ = [
    "Call",
    "Ending",
    "RankLost",
    "agree",
    "fill_",
    "finite",
    "from_main",
    "full",
    "gathered",
    "join",
    "launched",
    "leave",
    "like",
    "main",
    "mean",
    "own_device",
    "project_",
    "projection",
    "rank",
    "same_weights_",
    "shard",
    "share",
    "speaks",
    "sums",
    "take",
    "to_main",
    "watch",
    "world",
]
