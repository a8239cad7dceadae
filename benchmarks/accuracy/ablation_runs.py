"""One run of an ablation: prune as its arm says, train for what is left of the steps, answer the evaluation images."""

from __future__ import annotations

import copy
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import nvit
from benchmarks.accuracy.ablation_arms import Arm
from benchmarks.accuracy.paired import bits
from benchmarks.accuracy.ragged import padded, padded_masks, ragged, ragged_table
from nvit import adapters
from nvit.analysis.evaluate import macs
from nvit.prune.pruner import Pruner
from nvit.prune.timing import ratios_of
from nvit.selection.greedy import drop_cheapest
from nvit.spec import KINDS
from nvit.structure.compact import compact
from nvit.structure.masks import Masks, widths
from nvit.training.data import TrainingData, endless
from nvit.training.distill import Objective, frozen
from nvit.training.trainer import Trainer

NEVER = 1e-3
"""A latency target that no run comes to: it is the steps that end it."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large all runs are.

    Attributes:
        size: of the images, in pixels a side.
        each: training images of a class, and `dense_each` those that the dense model is trained on first.
        steps: of optimisation in every run, pruning and afterwards together.
        lr: of both, at batch 512 as everywhere in nvit; constant while pruning, then a cosine.
        calibration: images that one shot scores on.
        latency_batch: images of a batch whose latency is measured, for `table_seconds` and `ratio_seconds`.
    """

    size: int
    each: int
    dense_each: int
    dense_epochs: float
    evaluate_each: int
    batch: int
    steps: int
    interval: int
    bundles: int
    calibration: int
    lr: float = 5e-4
    target: float = 0.5
    amp: str = "bf16"
    device: str = "cpu"
    latency_batch: int = 8
    table_seconds: float = 40.0
    ratio_seconds: float = 2.0
    workers: int = 0


SCALES = {
    "small": Scale(
        size=112, each=8, dense_each=20, dense_epochs=1, evaluate_each=10, batch=32, steps=48, interval=2, bundles=30,
        calibration=512, lr=1.6e-3, target=0.65, ratio_seconds=1.0,
    ),
    "full": Scale(
        size=224, each=100, dense_each=100, dense_epochs=3, evaluate_each=50, batch=256, steps=1560, interval=40,
        bundles=16, calibration=2048, device="cuda", latency_batch=256, workers=8,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What all runs share.

    Attributes:
        dense: trained at the scale's image size, prepared, in evaluation mode.
        train, evaluation: images and class numbers.
        hard: another network for hard labels, with `renormalise` from the dense model's images to its own.
    """

    scale: Scale
    dense: nn.Module
    train: Any
    evaluation: Any
    table: nvit.LatencyTable
    hard: nn.Module | None = None
    renormalise: tuple[Tensor, Tensor] | None = None

    def loader(self, seed: int) -> TrainingData:
        return TrainingData(self.train, self.scale.batch, seed, self.scale.workers)

    def config(self, arm: Arm, seed: int) -> nvit.PruneConfig:
        """Ours, with what the arm says."""
        scale = self.scale
        ours = nvit.PruneConfig(
            latency_target=NEVER, batch_size=scale.batch, amp=scale.amp, lr=scale.lr, seed=seed, measure_seconds=0.0,
            interval=max(1, round(arm.pace[0] * scale.interval)), bundles_per_step=round(arm.pace[1] * scale.bundles),
            finetune_lr=scale.lr, min_lr=1e-6,
        )  # fmt: skip
        return replace(ours, **arm.settings)


class Steered(Pruner):
    """A pruner whose last decision takes no more bundles than its aim needs, so that all runs end at one latency.

    Attributes:
        reached: whether masks are those that the run aims at.
    """

    reached: Callable[[Masks], bool] = staticmethod(lambda masks: False)

    def decide(self) -> list[float]:
        whole, scores = self.config, self.scores()

        def enough(bundles: int) -> bool:
            eta = whole.latency_weight
            return self.reached(drop_cheapest(scores, self.masks, self.groups, self.table, bundles, eta))

        most = whole.bundles_per_step
        self.config = replace(whole, bundles_per_step=1 + bisect_left(range(1, most), True, key=enough))
        try:
            return super().decide()
        finally:
            self.config = whole


class PerStructure(Steered):
    """The same share of every kind of width leaves: a unit's score is its rank within its kind.

    Of a kind whose share that is gone is the least, the next bundle is the cheapest one; saliency orders within a kind.
    """

    def scores(self) -> dict[str, Tensor]:
        found, measured = {}, super().scores()
        for kind in KINDS:
            mine = [g for g in self.free if g.kind == kind]
            if not mine:
                continue
            keep = torch.cat([self.masks[g.name] for g in mine])
            saliency = torch.cat([measured[g.name].cpu() for g in mine])
            rank = torch.where(keep, saliency, -1.0).argsort(stable=True).argsort()  # what is gone comes first
            share = rank.double() / len(rank)
            found |= {g.name: s / g.multiple for g, s in zip(mine, share.split([g.size for g in mine]), strict=True)}
        return found


def run(bench: Bench, arm: Arm, seed: int) -> Iterator[dict[str, Any]]:
    """A row for each of `arm.rows`; `untouched` and `emptied` are the shares of the blocks' widths of which nothing, or
    all but one bundle, has left."""
    for name, (model, steps, seconds) in zip(arm.rows, pruned(bench, arm, seed), strict=True):
        start = time.process_time()
        model = trained(bench, arm, seed, model, bench.scale.steps - steps)
        seconds += time.process_time() - start
        right = answers(model, bench)
        blocks, dense = nvit.snapshot.spec_of(model).blocks, bench.table.dense
        kept = {k: sum(getattr(b, k) for b in blocks) / sum(getattr(b, k) for b in dense) for k in KINDS}
        least = nvit.PruneConfig().bundle_sizes
        pairs = [(k, getattr(b, k), getattr(d, k)) for b, d in zip(blocks, dense, strict=True) for k in KINDS[1:]]
        size = adapters.preprocess(bench.dense)["input_size"]
        ratios = ratios_of(bench.table.setting, bench.scale.ratio_seconds, lambda: bench.dense)
        measured = ratios([model])[0] if ratios else None
        yield {
            "table": arm.table,
            "arm": name,
            "seed": seed,
            "pruning_steps": steps,
            "steps": bench.scale.steps,
            "predicted_ratio": bench.table.ratio(blocks),
            "measured_ratio": measured and measured.value,
            "spread": measured and measured.spread,
            "macs": macs(model, size) / macs(bench.dense, size),
            "top1": 100 * float(right.mean()),
            **{f"kept_{kind}": share for kind, share in kept.items()},
            "untouched": sum(now == before for _, now, before in pairs) / len(pairs),
            "emptied": sum(now <= least[k] and now < before for k, now, before in pairs) / len(pairs),
            "cpu_s": seconds,
            "images": len(right),
            "right": bits(right),
        }


def pruned(bench: Bench, arm: Arm, seed: int) -> Iterator[tuple[nn.Module, int, float]]:
    """For every row of an arm a compact model, the training steps that it has had, and CPU seconds."""
    start = time.process_time()
    if arm.once:
        model = once(bench, arm, seed)
        yield model, 0, time.process_time() - start
        return
    scale, config, table = bench.scale, bench.config(arm, seed), bench.table
    heads = bench.dense.blocks[0].attn.heads
    model = copy.deepcopy(bench.dense) if arm.align else ragged(bench.dense)
    table = table if arm.align else ragged_table(table, heads)
    if arm.per_structure:  # ranks are in no unit that latency could be priced in
        config = replace(config, latency_weight=0.0)
    pruner = (PerStructure if arm.per_structure else Steered)(model.requires_grad_(True), table, config)
    aligned = adapters.find(bench.dense).groups(bench.dense)

    def by_table(masks: Masks) -> bool:
        return table.ratio(widths(pruner.groups, masks)) <= scale.target

    def as_padded(masks: Masks) -> bool:
        return bench.table.ratio(widths(aligned, padded_masks(aligned, masks, heads))) <= scale.target

    for steps in masked_steps(bench, arm, pruner, [by_table] if arm.align else [by_table, as_padded]):
        found = compact(model, pruner.groups, pruner.masks) if arm.align else padded(model, bench.dense, pruner.masks)
        yield found, steps, time.process_time() - start
        start = time.process_time()


def masked_steps(bench: Bench, arm: Arm, pruner: Steered, stops: Sequence[Callable[[Masks], bool]]) -> Iterator[int]:
    """Train and decide in turn, as `nvit.prune` does; the steps so far each time that the next stop is reached, and for
    those that are not, all steps of the scale."""
    config, left = pruner.config, list(stops)
    objective = Objective.of(config, pruner.task, *teachers(bench, arm, config))
    trainer = Trainer(
        pruner.model, objective, config, config.lr, None,
        observe=pruner.observe, constrain=lambda: pruner.project(), replayed=lambda: pruner.criterion.replayed(),
    )  # fmt: skip
    pruner.work_in(trainer.call)
    pruner.reached = left[0]
    for _, (images, labels) in endless(bench.loader(config.seed), config.seed):
        deciding = pruner.deciding
        trainer.train_step(images, labels)
        pruner.advance()
        if deciding:
            trainer.masks_changed()
        while trainer.step == bench.scale.steps or (deciding and pruner.reached(pruner.masks)):
            yield trainer.step
            left.pop(0)
            if not left:
                pruner.stop_recording()
                return
            pruner.reached = left[0]


def once(bench: Bench, arm: Arm, seed: int) -> nn.Module:
    """One shot by `nvit.prune`, no training."""
    scale = bench.scale
    shot = {"train": False, "latency_target": (scale.target,), "images": scale.calibration}
    config = replace(bench.config(arm, seed), **shot)
    return nvit.prune(copy.deepcopy(bench.dense), bench.loader(seed), config, bench.table).model


def teachers(bench: Bench, arm: Arm, config: nvit.PruneConfig) -> tuple[nn.Module | None, nn.Module | None, Any]:
    """The unpruned model, the one of hard labels, and its normalisation; as far as the arm has them."""
    full = frozen(copy.deepcopy(bench.dense)) if config.distill_weight else None
    return full, bench.hard if arm.hard else None, bench.renormalise if arm.hard else None


def trained(bench: Bench, arm: Arm, seed: int, model: nn.Module, steps: int) -> nn.Module:
    """The compact model after so many further steps."""
    if not steps:
        return model.eval()
    config, loader = bench.config(arm, seed), bench.loader(seed)
    full, hard, renormalise = teachers(bench, arm, config)
    tuning = replace(config, finetune_epochs=steps / len(loader)).finetuning()
    return nvit.finetune(
        model.requires_grad_(True).train(), loader, tuning, teacher=full, cnn_teacher=hard, renormalise=renormalise
    )


@torch.inference_mode()
def answers(model: nn.Module, bench: Bench) -> Tensor:
    """Right or wrong by evaluation image, float `(images,)`, in the scale's precision."""
    found, device = [], next(model.parameters()).device
    for x, y in nvit.data.evaluation_loader(bench.evaluation, 50, bench.scale.workers):
        with torch.autocast(device.type, torch.bfloat16, enabled=bench.scale.amp == "bf16"):
            found.append((model(x.to(device)).argmax(-1).cpu() == y).float())
    return torch.cat(found)
