"""What a run will take, found out by doing a little of it on a copy of the model: seconds by stage, memory, steps."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from .. import adapters, tasks
from ..config import PruneConfig, TrainingConfig
from ..latency.table import LatencyTable
from ..selection.greedy import drop_cheapest
from ..structure.masks import widths
from ..training.batches import parts
from ..training.distill import Objective, frozen
from ..training.trainer import Trainer
from ..utils.memory import Meter
from .api import prune
from .polish import BATCH, polish_
from .pruner import Pruner
from .result import PruneResult
from .sample import count_images
from .scoring import score

TIMED_STEPS = 3
"""Training steps that are timed, after one that is not."""

FEW = 16
"""Images a batch of a rehearsal on a CPU, where an image costs the same in any batch."""


@dataclass(frozen=True)
class Stage:
    """A part of a run: what, how much of it in words, seconds."""

    name: str
    count: str
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """What is to come.

    Attributes:
        peak: bytes held at most, on a GPU allocated, else resident; None where the system does not say.
    """

    stages: tuple[Stage, ...]
    peak: int | None


class Watch:
    """Seconds and memory of pieces of work on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        try:
            self.meter: Meter | None = Meter(device)
        except ValueError:
            self.meter = None

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def of(self, work: Callable[[], object]) -> tuple[float, int]:
        """Seconds that `work` takes, and the most bytes held meanwhile (0 where nobody says)."""
        if self.meter is not None:
            self.meter.restart()
        start = self.now()
        work()
        return self.now() - start, 0 if self.meter is None else self.meter.peak


def forecast_one_shot(model: nn.Module, loader, config: PruneConfig, table: LatencyTable) -> Forecast:
    """Scoring, deciding and refitting: rehearsed with two small batches and with two of twice the size, which tells
    what an image takes and what goes beside."""
    watch, images = Watch(next(model.parameters()).device), count_images(loader, config)
    if images is None:
        raise ValueError("the loader does not say how many images it has; set images, and give it a batch_size")
    size = min(config.batch_size, max(2, images // 2))
    large = min(size, FEW) if watch.device.type == "cpu" else size
    small = max(1, large // 2)
    batch, load = _first_batch(loader, 2 * large, watch)
    little = dataclasses.replace(
        config,
        latency_target=config.latency_target[-1:],
        sweep=False,
        rounds=1,
        polish=0,
        measure_seconds=0.0,
        images=0,
        score_batches=2,
    )

    measuring: list[float] = []

    def rehearse(size: int) -> tuple[float, int]:
        """Seconds but for those of measuring costs, which a run does once, and the most memory."""
        twin, few = copy.deepcopy(model), [_cut(batch, slice(i * size, (i + 1) * size)) for i in (0, 1)]
        seconds, held = watch.of(lambda: measuring.append(_cost_seconds(prune(twin, few, little, table))))
        return (seconds - measuring[-1] if measuring else seconds), held

    def warm_up() -> None:
        score(Pruner(copy.deepcopy(model), table, little, timer=None), [_cut(batch, slice(0, 1))])

    watch.of(warm_up)  # what is loaded, chosen and tuned at first use
    (some, held), (more, held_more) = rehearse(small), rehearse(large)
    each = (more - some) / (2 * (large - small)) if large > small else more / (2 * large)
    beside = max(0.0, more - 2 * large * each)
    passes = 2 if config.refit else 1
    decisions = len(config.latency_target) * config.rounds
    looks = 1 if config.sweep and not config.refit else decisions  # a sweep's refits are counted as scores too: at most
    seconds = decisions * beside + looks * images * (max(0.0, each) + passes * load)
    if config.measures_costs:
        of_each = max(0.0, measuring[1] - measuring[0]) / (2 * max(1, large - small))
        seconds += max(0.0, measuring[1] - 2 * large * of_each) + images * (of_each + load)
    peak = held_more + (size - large) * (held_more - held) // max(1, large - small)
    if config.refit:  # all images at one block, and what its attention gives, of the pruned and of the dense model
        wide = table.dense[0].emb * adapters.find(model).tokens(model) * next(model.parameters()).element_size()
        peak += 4 * wide * max(0, images - 2 * size)
    what = "score, measure costs, decide" if config.measures_costs else "score, decide"
    what += ", refit" * config.refit + ", merge" * config.merges_tokens
    times = f"{images} images" + (f", {looks} times" if looks > 1 else "")
    stages = [Stage(what, times, seconds)]
    if config.polish:
        stages.append(
            _polishing(model, [_cut(batch, slice(i * large, (i + 1) * large)) for i in (0, 1)], config, watch)
        )
    return Forecast(tuple(stages), peak if watch.meter else None)


def _polishing(model: nn.Module, few: Sequence, config: PruneConfig, watch: Watch) -> Stage:
    """Polish steps of every snapshot, as two steps of the dense model tell; a forward pass is a quarter of one."""
    twin, dense = copy.deepcopy(model), frozen(copy.deepcopy(model))
    size = len(few[0][0])
    seconds, _ = watch.of(lambda: polish_(twin, dense, few, dataclasses.replace(config, polish=2, images=0)))
    image = seconds / (2 * size + 2 * size / 4)
    every = config.polish * BATCH * image
    total = sum(every * (1 + 3 * target) / 4 for target in config.latency_target)
    times = f", {len(config.latency_target)} times" if len(config.latency_target) > 1 else ""
    return Stage("polish", f"{config.polish} steps{times}", total)


def _cost_seconds(result: PruneResult) -> float:
    """Seconds in which a run measured what groups cost."""
    return max((row.get("cost_seconds", 0.0) for row in result.history), default=0.0)


def forecast_training(
    model: nn.Module, loader, config: PruneConfig, table: LatencyTable, cnn_teacher: nn.Module | None, renormalise
) -> Forecast:
    """Training between decisions: a few steps are taken, and decisions on what they say of the units until the last
    target is met by the table; a step costs what is left of the student, and all of the teacher."""
    twin = copy.deepcopy(model)
    pruner = Pruner(twin, table, config, timer=None)
    try:
        step, teacher, peak = _steps(twin, loader, config, config.lr, cnn_teacher, renormalise, model, pruner)
        scores = pruner.scores()
    finally:
        pruner.stop_recording()
    masks, ratio, decisions, seconds = pruner.masks, 1.0, 0, 0.0
    while ratio > pruner.targets[-1]:
        seconds += config.interval * (teacher + ratio * (step - teacher))
        masks = drop_cheapest(scores, masks, pruner.groups, table, config.bundles_per_step, config.latency_weight)
        before, ratio = ratio, table.ratio(widths(pruner.groups, masks))
        decisions += 1
        if ratio == before:
            break  # only last bundles are left
    count = f"about {decisions * config.interval} steps, {decisions} decisions"
    return Forecast((Stage("train and prune", count, seconds),), peak)


def forecast_finetuning(
    model: nn.Module, loader, config: PruneConfig, cnn_teacher: nn.Module | None, renormalise
) -> Forecast:
    """`finetune_epochs` of every snapshot: a few steps of the dense model, and each snapshot's share of them."""
    settings = config.finetuning()
    twin = copy.deepcopy(model)
    step, teacher, peak = _steps(twin, loader, settings, settings.lr, cnn_teacher, renormalise, model)
    steps = max(1, round(settings.epochs * len(loader)))
    seconds = sum(steps * (teacher + t * (step - teacher)) for t in config.latency_target)
    count = f"{steps} steps" + (f", {len(config.latency_target)} times" if len(config.latency_target) > 1 else "")
    return Forecast((Stage("finetune", count, seconds),), peak)


def _steps(
    twin: nn.Module,
    loader,
    config: TrainingConfig,
    lr: float,
    cnn_teacher: nn.Module | None,
    renormalise,
    dense: nn.Module,
    pruner: Pruner | None = None,
) -> tuple[float, float, int | None]:
    """Seconds of a training step of the dense model, of the teacher's part in it, and the bytes held meanwhile."""
    watch, taught = Watch(next(twin.parameters()).device), bool(config.distill_weight)
    unpruned = frozen(copy.deepcopy(dense)) if taught else None
    watched = {} if pruner is None else {"observe": pruner.observe, "constrain": lambda: pruner.project()}
    objective = Objective.of(config, tasks.settled(config, twin), unpruned, cnn_teacher, renormalise)
    trainer = Trainer(twin, objective, dataclasses.replace(config, graphs=False), lr, None, **watched)
    times: list[float] = []

    def work() -> None:
        for images, labels in _endlessly(loader, TIMED_STEPS + 1, watch, times):
            trainer.train_step(images, labels)
            trainer.look()

    _, peak = watch.of(work)
    images = parts(next(iter(loader)))[0].to(watch.device)
    forward = 0.0
    for teacher in filter(None, (unpruned, cnn_teacher)):
        with torch.no_grad():
            forward += watch.of(lambda teacher=teacher: teacher(images))[0]
    # The first step warms up; a step lasts from one batch asked for to the next, loading included.
    return sorted(times[1:])[(len(times) - 1) // 2], forward, peak if watch.meter else None


def _endlessly(loader, steps: int, watch: Watch, times: list[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """So many batches, epoch after epoch, and into `times` the seconds from one to the next."""
    done = 0
    while done < steps:
        start = watch.now()
        for batch in islice(loader, steps - done):
            yield parts(batch)
            times.append(watch.now() - start)
            start, done = watch.now(), done + 1


def _first_batch(loader, count: int, watch: Watch) -> tuple[Sequence[Tensor | None], float]:
    """The first `count` images and their labels, and the seconds in which an image is loaded."""
    start, found, held = watch.now(), [], 0
    for batch in loader:
        found.append(parts(batch))
        held += len(found[-1][0])
        if held >= count:
            break
    load = (watch.now() - start) / held
    images = torch.cat([i for i, _ in found])[:count]
    labels = None if found[0][1] is None else torch.cat([torch.as_tensor(y) for _, y in found])[:count]
    return (images, labels), load


def _cut(batch: Sequence[Tensor | None], span: slice) -> tuple[Tensor, Tensor] | Tensor:
    images, labels = batch
    return images[span] if labels is None else (images[span], labels[span])
