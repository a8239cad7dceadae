"""Small pruning runs on synthetic images, the moments at which they are interrupted, and what is compared of them."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from nvit import LatencyTable, PruneConfig, adapters
from nvit.structure.masks import weight_masks
from nvit.training.data import TrainingData
from tests.hosts import make

SETTINGS = {
    "latency_target": (0.8, 0.5),
    "interval": 2,
    "bundles_per_step": 3,
    "batch_size": 8,
    "lr": 0.05,
    "distill_weight": 1.0,
    "save_every": 0.0,
    "bundle_heads": 1,
    "seed": 3,
}
"""A run of about thirty steps whose weights move visibly."""


class NoisyImages(Dataset):
    """Forty labelled images of the tiny models' size, a new draw of noise at each look."""

    def __init__(self, size: int = 40, bad: frozenset[int] = frozenset()) -> None:
        g = torch.Generator().manual_seed(0)
        self.images = torch.randn(size, 3, 16, 16, generator=g)
        self.images[sorted(bad)] = float("nan")
        self.labels = torch.randint(7, (size,), generator=g)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        return self.images[i] + 0.1 * torch.randn(3, 16, 16), self.labels[i]


def config(**more) -> PruneConfig:
    return PruneConfig(**(SETTINGS | more))


def loader(settings: PruneConfig, **more) -> TrainingData:
    return TrainingData(NoisyImages(**more), settings.batch_size, settings.seed)


def table(model, settings: PruneConfig) -> LatencyTable:
    return LatencyTable.analytic(model, settings.bundle_sizes)


def arguments(host: str = "plain", **more):
    """Everything `nvit.prune` takes, made anew."""
    settings, model = config(**more), make(host)
    return model, loader(settings), settings, table(model, settings)


class Stop(Exception):
    """Raised by a progress callback to end a run."""


def stop_after(calls: int):
    left = [calls]

    def progress(done: int, total: int, text: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    return progress


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of every parameter."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b) -> bool:
    """Whether two dictionaries of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def groups_of(model):
    return adapters.find(model).groups(model)


def assert_pruned_weights_are_zero(model, groups, masks) -> None:
    params = dict(model.named_parameters())
    for name, dims in weight_masks(params, groups, masks).items():
        for d, keep in enumerate(dims):
            if keep is not None:
                gone = params[name].index_select(d, (~keep).nonzero().squeeze(1))
                assert not gone.any(), f"{name}: a pruned weight came back"
