"""What has to work on any device, as functions of a tiny model there; each returns tensors that do not depend on where
they were computed. `tests/test_devices.py` runs the list on a fake device and, where there is one, on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

import nvit
from nvit import adapters, parallel, tasks
from nvit.calibration.replay import Replay
from nvit.calibration.statistics import StatisticsRecorder, gather_statistics
from nvit.layers import prunable_layers
from nvit.prune.pruner import Pruner
from nvit.prune.tokens import shape_of
from nvit.refit.costs import measure_costs
from nvit.refit.entries import entries, refittable
from nvit.refit.gather import Pair, moments_at, row_weights
from nvit.refit.judge import Judge
from nvit.refit.refit import refit_
from nvit.refit.rotation import rotate_
from nvit.selection.schedules import FAMILIES
from nvit.structure import snapshot
from nvit.structure.compact import compact
from nvit.structure.masks import apply_, full_masks
from nvit.training.distill import Objective, frozen
from nvit.training.optimizer import decay_groups, fused_adamw
from nvit.training.step import Step
from tests.families import HOSTS
from tests.hosts import random_masks
from tests.runs import config, table

Found = dict[str, Tensor]
Quiet = Callable[[], AbstractContextManager]


@dataclass
class Place:
    """A tiny model on a device, prepared.

    Attributes:
        quiet: inside it, making the host wait for the device is an error.
        arrives: a batch on its way there.
    """

    host: str
    device: torch.device
    quiet: Quiet = nullcontext
    folder: str = ""
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        model = HOSTS[self.host]()
        self.adapter = adapters.find(model)
        self.size = tuple(self.adapter.preprocess(model)["input_size"])
        self.model = self.adapter.prepare(model.to(self.device))
        self.groups = self.adapter.groups(self.model)
        dense(self)

    def images(self, seed: int = 1, batch: int = 4) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.randn(batch, *self.size, generator=g).to(self.device)

    def labels(self, seed: int = 1, batch: int = 4) -> Tensor:
        classes = adapters.classes(self.model)
        return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed)).to(self.device)

    def logits(self, model: nn.Module, images: Tensor) -> Found:
        """Of both tokens; at first use a host may make tables."""
        with torch.no_grad():
            adapters.of(model).logits(model, images)
        with torch.no_grad(), self.quiet():
            found = [t for t in adapters.of(model).logits(model, images) if t is not None]
        assert all(t.device == self.device for t in found)
        return {f"logits {i}": t for i, t in enumerate(found)}

    def pruner(self, **how) -> Pruner:
        settings = config(latency_target=(0.3,), **how)
        return Pruner(self.model, table(self.model, settings), settings)


def dense(place: Place) -> Found:
    return place.logits(place.model, place.images())


def masked(place: Place, kind: str) -> Found:
    """One kind of width, or every."""
    masks = random_masks(place.groups, 0.6)
    masks |= {g.name: torch.ones_like(masks[g.name]) for g in place.groups if kind not in (g.kind, "every")}
    apply_(place.model, place.groups, masks)
    return place.logits(place.model, place.images())


def compacted(place: Place) -> Found:
    masks = random_masks(place.groups, 0.6)
    apply_(place.model, place.groups, masks)
    small = compact(place.model, place.groups, masks).eval()
    return place.logits(small, place.images())


def merged(place: Place) -> Found:
    """Tokens merge, where the family lets them: at dense widths, masked, and compact."""
    if place.adapter.merge_refusal(place.model) is not None:
        return {}
    tokens, prefix, blocks = shape_of(place.model)
    adapters.merge_(place.model, FAMILIES["uniform"](tokens, prefix, blocks, 0.5))
    assert any(adapters.merges(place.model))
    found = {f"dense {name}": t for name, t in place.logits(place.model, place.images()).items()}
    return found | {f"masked {name}": t for name, t in masked(place, "every").items()} | compacted(place)


def shortened(place: Place) -> Found:
    """The first block without attention, the last without MLP, where the family lets them leave."""
    leaving = [g for g in place.groups if g.ends is not None]
    masks = full_masks(place.groups)
    for group in leaving[:1] + leaving[-1:]:
        for name in (group.name, *group.ends):
            masks[name] = torch.zeros_like(masks[name])
    small = compact(place.model, place.groups, masks).eval()
    return place.logits(small, place.images())


def loaded(place: Place) -> Found:
    """A snapshot made on the CPU, read there or on the device, and moved."""
    there = Place(place.host, torch.device("cpu"))
    small = compact(there.model, there.groups, random_masks(there.groups, 0.6)).eval()
    snapshot.save(place.folder, small)
    at = place.device if place.device.type == "cuda" else "cpu"
    return place.logits(nvit.load(place.folder, device=at).to(place.device), place.images())


def scored(place: Place, criterion: str) -> Found:
    """Saliency of the dense model, then of the masked one; nothing is read back between decisions."""
    pruner = place.pruner(train=False, criterion=criterion)
    found = {}
    for turn in range(2):
        for batch in range(2):
            images, labels = place.images(batch), place.labels(batch)
            with place.quiet():
                pruner.score(images, labels)
        found |= {f"{turn} {name}": s.cpu() for name, s in pruner.scores().items()}
        pruner._forget()
        pruner._set_masks(random_masks(place.groups, 0.6))
    pruner.stop_recording()
    return found


def decided(place: Place) -> Found:
    """The scores of a batch with labels that the model draws, one decision, and the compact model."""
    pruner = place.pruner(train=False, criterion="hessian", labels="sampled")
    images = place.images()
    with place.quiet():
        pruner.score(images)
    pruner.decide_at(0.8)
    assert pruner.ratio <= 0.8
    assert next(iter(place.logits(pruner.compact(), place.images()).values())).isfinite().all()
    return {}


def trained(place: Place, criterion: str) -> Found:
    """Steps with a teacher: dense, then masked by a decision on their scores."""
    pruner = place.pruner(criterion=criterion, interval=2, bundles_per_step=9)
    objective = Objective(tasks.of("auto", place.model), frozen(copy.deepcopy(place.model)), weight=1.0)
    optimizer = torch.optim.AdamW(decay_groups(place.model, 0.05), lr=1e-3)
    assert fused_adamw(optimizer)
    call = parallel.Call(place.model, place.adapter.logits)
    step = Step(call, objective, optimizer, clip=1.0, observe=pruner.observe, constrain=lambda: pruner.project())
    losses = []
    for turn in range(4):
        images, labels = place.images(turn), place.labels(turn)
        with place.quiet():
            step(images, labels)
        losses.append(step.look())
        if turn == 1:
            found = {name: s.cpu().clone() for name, s in pruner.scores().items()}
            pruner._set_masks(random_masks(place.groups, 0.6))
    assert all(s.device == place.device for state in optimizer.state.values() for s in state.values() if s.dim())
    pruner.stop_recording()
    return found | {"losses": torch.tensor(losses)}


def one_shot(place: Place, **how) -> Found:
    batches = [(place.images(b), place.labels(b)) for b in range(3)]
    settings = config(latency_target=(0.8,), train=False, criterion="auto", **how)
    result = nvit.prune(place.model, batches, settings, table(place.model, settings))
    (small,) = result.snapshots
    assert result.history[-1]["predicted_ratio"] <= 0.8
    assert next(iter(place.logits(small.model, place.images()).values())).isfinite().all()
    return {}


def captured(place: Place) -> Found:
    """What a refit sums up on its way through both models, nothing read back between two solutions."""
    dense, batches = frozen(copy.deepcopy(place.model)), [place.images(b) for b in range(3)]
    masks, found = random_masks(place.groups, 0.6), {}
    recorder = StatisticsRecorder(dense)
    with recorder:
        for images in batches[:2]:
            with place.quiet():
                recorder.backward(place.adapter.logits(dense, images).mean)
    known = recorder.statistics
    apply_(place.model, place.groups, masks)
    pair = Pair(Replay(place.model), Replay(dense), 2)
    with torch.inference_mode():
        for images in batches:
            pair.ours.enter(images)
            pair.theirs.enter(images)
        for block in pair.ours.adapter.block_names(place.model):
            inside = {n: m for n, m in prunable_layers(dense).items() if n.startswith(f"{block}.")}
            entered = entries(pair.theirs, inside)
            for name in (n for n, m in inside.items() if refittable(m)):
                for end in ("in", "out"):
                    with place.quiet():
                        weights = row_weights(known, (name, end), 0.2)
                        halves = moments_at(pair, (name, end), weights, entered.get(name) if end == "out" else None)
                    for i, (fitted, held) in enumerate(halves):
                        found |= {f"{name}.{end} {i}": fitted.rx.cpu(), f"{name}.{end} {i}, held": held.rx.cpu()}
            with place.quiet():
                pair.advance()
    return found


def refitted(place: Place) -> Found:
    """In a turned basis, by statistics of the dense model."""
    batches = [place.images(b) for b in range(4)]
    known = gather_statistics(place.model, batches)
    rotate_(place.model, known)
    dense = frozen(copy.deepcopy(place.model))
    apply_(place.model, place.groups, random_masks(place.groups, 0.6))
    refit_(place.model, dense, place.groups, batches, statistics=known)
    return place.logits(place.model, place.images(9))


def costs(place: Place) -> Found:
    """Measured group by group; passes over images read nothing back."""
    batches = [place.images(b) for b in range(3)]
    task = tasks.of("classification", place.model)
    judge = Judge(place.model, place.groups, task)
    for images in batches:
        judge.take(images)
    judge.ready()
    with torch.inference_mode(), place.quiet():
        nothing = judge.near.mean(adapters.of(place.model).logits(place.model, x) for x in judge.shown)
    draw = torch.Generator().manual_seed(0)
    scores = {g.name: torch.rand(g.size, generator=draw).to(place.device) for g in place.groups}
    curves = measure_costs(place.model, place.groups, scores, batches, task=task)
    return {name: torch.tensor(curve.cost) for name, curve in curves.items()} | {"nothing": 1 + nothing.cpu()}


JOBS: dict[str, Callable[[Place], Found]] = {"dense": dense, "compact": compacted, "snapshot": loaded}
JOBS |= {f"masked {k}": partial(masked, kind=k) for k in ("emb", "heads", "qk_dim", "v_dim", "mlp", "every")}
JOBS |= {f"scores {c}": partial(scored, criterion=c) for c in ("hessian", "nvit", "abs", "fisher", "taylor")}
JOBS |= {f"scores {c}": partial(scored, criterion=c) for c in ("curvature", "remaining", "magnitude", "random")}
JOBS |= {"decision": decided} | {f"training {c}": partial(trained, criterion=c) for c in ("hessian", "nvit", "abs")}
JOBS |= {"capture": captured, "refit": refitted, "costs": costs}
JOBS |= {"merged": merged, "shortened": shortened, "one shot": one_shot}
JOBS |= {
    f"one shot {name}": partial(one_shot, refit=True, **how)
    for name, how in {
        "refitted": {"cost": "predicted"},
        "polished": {"cost": "predicted", "polish": 2, "coarse": 0.5},
        "shortened": {"depth": True},
        "merged": {"cost": "predicted", "only": ("widths", "tokens")},
    }.items()
}
