"""The plan of `nvit prune`: what it would do, take and write, from a few timed batches; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from torch.utils.data import DataLoader

from ..analysis import compare
from ..analysis.evaluate import accuracy
from ..config import PruneConfig
from ..latency.clock import PATIENCE, time_rounds
from ..latency.measure import sample_images
from ..latency.spread import ROUNDS, STEADY, ratio_to_first
from ..latency.table import LatencyTable
from ..prune.budget import parse
from ..prune.budget import show as show_bytes
from ..prune.forecast import Stage, Watch, forecast_finetuning, forecast_one_shot, forecast_training
from ..prune.sample import count_images
from ..training.data import TrainingData
from ..utils.report import in_time


@dataclass(frozen=True)
class Work:
    """What a run works on.

    Attributes:
        training: batches for finetuning; None where there is none.
        opening: seconds that opening it took, which the run takes too.
        latency_batch, latency_seconds: as the command's flags.
    """

    name: str
    model: nn.Module
    loader: TrainingData
    training: TrainingData | None
    evaluation: DataLoader | None
    table: LatencyTable
    config: PruneConfig
    opening: float
    latency_batch: int
    latency_seconds: float
    cnn_teacher: nn.Module | None = None
    renormalise: object = None


@dataclass(frozen=True)
class Plan:
    """A run's stages with their seconds, and the bytes it holds at most; None where the system does not say."""

    work: Work
    stages: tuple[Stage, ...]
    peak: int | None

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def lines(self, out: str) -> Iterator[str]:
        """The plan for people."""
        work, config = self.work, self.work.config
        size, wanted = compare.size(work.model), sorted(config.latency_target, reverse=True)
        yield f"model: {work.name}, {size['params'] / 1e6:.2f} M parameters, {size['macs'] / 1e9:.3f} GMACs"
        way = "while training" if config.train else "in one shot" + (", refitted" if config.refit else "")
        yield f"targets: {', '.join(f'{t:g}' for t in wanted)} of the dense latency, {way}, criterion {config.saliency}"
        there = (
            f"{work.loader.size} to train on" if config.train else f"{count_images(work.loader, config)} to calibrate"
        )
        tested = "none to evaluate" if work.evaluation is None else f"{len(work.evaluation.dataset)} to evaluate"
        yield f"images: {there}, in batches of {config.batch_size}; {tested}"
        for stage in self.stages:
            yield f"  {stage.name:18s}{in_time(stage.seconds):>10s}   {stage.count}"
        yield f"  {'together about':18s}{in_time(self.seconds):>10s}   on this machine as it is now"
        held = "unknown here" if self.peak is None else f"at most about {show_bytes(self.peak)}"
        yield f"memory: {held}, {'allocated on the GPU' if _on_gpu(work.model) else 'resident'}"
        weights = 4 * size["params"] * (sum(wanted) + 4 * config.train + 4 * bool(config.finetune_epochs))
        names = [f"target-{t:g}/" for t in wanted] + ["latency_table.json", "history.csv", "result.json"]
        yield f"{out}/ would hold {', '.join(names)}: about {show_bytes(weights)}; nothing has been written"


def _on_gpu(model: nn.Module) -> bool:
    return next(model.parameters()).is_cuda


def plan(work: Work) -> Plan:
    """Do a little of everything that the run does, and say what all of it takes."""
    config, watch = work.config, Watch(next(work.model.parameters()).device)
    stages, peaks = [Stage("open", "model, images, latency table", work.opening)], []
    with_dense = 1 + sum(config.latency_target)
    if work.evaluation is not None:
        data, total = work.evaluation, len(work.evaluation.dataset)
        few = [batch for batch, _ in zip(data, range(2), strict=False)]
        accuracy(work.model, few[:1], amp=config.amp)
        seconds, peak = watch.of(lambda: accuracy(work.model, few[-1:], amp=config.amp))
        start = watch.now()
        next(iter(data))
        load = (watch.now() - start) / len(few[0][0])
        each = seconds / len(few[-1][0])
        models = 1 + len(config.latency_target)
        stages.append(
            Stage("evaluate", f"{total} images, {models} models", total * (with_dense * each + models * load))
        )
        peaks.append(peak)
    if config.train:
        given = (work.model, work.loader, config, work.table, work.cnn_teacher, work.renormalise)
        found = [forecast_training(*given)]
    else:
        found = [forecast_one_shot(work.model, work.loader, config, work.table)]
    if work.training is not None:
        found.append(forecast_finetuning(work.model, work.training, config, work.cnn_teacher, work.renormalise))
    stages += [stage for f in found for stage in f.stages]
    stages.append(_latency(work, watch))
    peaks += [f.peak for f in found]
    peak = None if None in peaks or watch.meter is None else max(peaks)
    return Plan(work, tuple(stages), parse(config.budget) if config.budget else peak)


def _latency(work: Work, watch: Watch) -> Stage:
    """Measuring compact models: at each target twice, as a corrected aim does, and all of them at the end; for longer
    where the machine is as busy as the dense model's timings against itself say."""
    config, images = work.config, sample_images(work.model, work.latency_batch)
    rounds: list[np.ndarray] = []
    took, _ = watch.of(lambda: rounds.append(time_rounds([work.model] * 2, images, 0.0)))
    dense = took / (2 * (ROUNDS + 1))
    needed = ROUNDS * max(1.0, (ratio_to_first(rounds[0], 1).spread / STEADY) ** 2)

    def measured(seconds: float, ratios: Sequence[float]) -> float:
        one = dense * (1 + sum(ratios))
        return one + max(ROUNDS * one, min(max(seconds, needed * one), PATIENCE * seconds))

    total = measured(work.latency_seconds / 8, config.latency_target)
    if work.table.setting is not None and config.measure_seconds and not config.budget:
        total += sum(2 * measured(config.measure_seconds, [t]) for t in config.latency_target)
    return Stage("measure latency", f"{work.latency_batch} images a batch", total)
