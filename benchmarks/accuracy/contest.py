"""Ways to narrow one trained model to measured latencies, each then trained on as many images: who is more accurate.

Every model starts from the same dense one and sees as many training images, of the same set, with the same loss (cross
entropy and the dense model as teacher), optimiser and schedule. Pruning that trains spends its images from the same
account. Latency is measured in turn with the dense model.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nvit
from benchmarks.accuracy import shapes
from benchmarks.accuracy.library import answers
from benchmarks.accuracy.paired import answered, bits, paired_bootstrap
from benchmarks.accuracy.rows import Resumed
from benchmarks.accuracy.tiny_imagenet import Batches, Images
from nvit import adapters
from nvit.analysis.compare import measured, size
from nvit.latency.clock import as_deployed, in_dtype
from nvit.latency.measure import sample_images
from nvit.prune.timing import clock_of, ratios_of
from nvit.selection.lagrangian import drop_to_target
from nvit.structure.masks import full_masks

KEY = ("target", "method")
OURS = ("nvit, one shot and refit", "nvit, iterative")
PEERS = ("Torch-Pruning, Taylor", "Torch-Pruning, isomorphic", "uniform", "ReViT-shaped", "magnitude", "random")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything.

    Attributes:
        size: pixels of an image's side, as the models see it.
        targets: of latency, as fractions of dense, largest first.
        dense_images: that the dense model is trained on first.
        images: that every narrow model is trained on in all.
        pruning_images: of these, about so many while the iterative run prunes to the last target.
        decisions: of that run, about.
        calibration: images that score and refit.
        rates: learning rates of AdamW at this batch size, at the top of the cosine; of each model the one counts with
            which it knows more of the training images held back. Pruning that trains takes the first, the dense model
            the last.
        seconds: of a reading of latency, 0 for the table's word; `table_seconds` of the table.
    """

    size: int = 112
    targets: tuple[float, ...] = (0.65, 0.5)
    dense_images: int = 3200
    images: int = 1600
    pruning_images: int = 800
    decisions: int = 25
    batch_size: int = 32
    calibration: int = 400
    rates: tuple[float, ...] = (1e-4, 3e-4)
    amp: str = "bf16"
    graphs: bool = True
    distill_weight: float = 10.0
    distill_tau: float = 2.0
    latency_batch: int = 8
    seconds: float = 1.5
    table_seconds: float = 20.0

    def objective(self, lr: float) -> dict[str, Any]:
        """What pruning that trains and finetuning share."""
        return {
            "batch_size": self.batch_size,
            "lr": lr * 512 / self.batch_size,
            "grad_clip": 1.0,
            "amp": self.amp,
            "graphs": self.graphs,
            "distill_weight": self.distill_weight,
            "distill_tau": self.distill_tau,
        }


_BEGAN = time.monotonic()


def say(line: str) -> None:
    """A line of progress, with the seconds since the program began."""
    print(f"{time.monotonic() - _BEGAN:6.1f} s  {line}", file=sys.stderr, flush=True)


Made = dict[float, tuple[nn.Module, int]]
"""By target, a compact model and the images that it has been trained on."""


class Contest:
    """One dense model, and everything that is made of it, kept in a folder.

    Args:
        host: makes the model as timm has it, with the weights to start from.
        train, held, val: images to train on, to choose a learning rate by, and to evaluate on, all on the device that
            trains.
    """

    def __init__(
        self,
        scale: Scale,
        host: Callable[[], nn.Module],
        train: Images,
        held: Images,
        val: Images,
        work: Path,
        rows: Resumed,
    ) -> None:
        self.scale, self.host, self.work, self.rows = scale, host, work, rows
        self.train, self.held, self.val = train, held, val
        self.device = train.pixels.device
        self.dense = self._dense()
        self.table = self._table()
        self.clock = clock_of(ratios_of(self.table.setting, scale.seconds, lambda: copy.deepcopy(self.dense)))
        self._scores: Mapping[str, Tensor] | None = None

    def _dense(self) -> nn.Module:
        """Trained first, on what the data set asks for; a row of its own."""
        path = self.work / "dense"
        if not path.exists():
            model = self.host().to(self.device)
            nvit.snapshot.save(path, self.trained(model, self.scale.dense_images, self.scale.rates[-1], None))
        model = nvit.load(path, device=str(self.device))
        if self.row(1.0, "dense") is None:
            self._add(1.0, "dense", model, self.scale.dense_images, 0.0, self.right(model))
        return model

    def row(self, target: float, method: str) -> dict[str, Any] | None:
        """The row of a model; None where there is none, or one that says why there is no model."""
        row = self.rows.find(target=target, method=method)
        return None if row is None or row.get("failed") else row

    def failed(self, method: str, why: Exception) -> None:
        """Say so in the rows of a method that has none yet."""
        line = (str(why).strip().splitlines() or [""])[0][:200]
        for target in self.missing(method):
            self.rows.add(target=target, method=method, failed=f"{type(why).__name__}: {line}")

    def _table(self) -> nvit.LatencyTable:
        file = self.work / "latency_table.json"
        if not file.exists():
            batch, seconds = self.scale.latency_batch, self.scale.table_seconds
            nvit.LatencyTable.measure(self.dense, batch, self.device, seconds=seconds).save(file)
        table = nvit.LatencyTable.load(file)
        say(f"{table}")
        return table

    def loader(self) -> Batches:
        """Training images, shuffled and augmented."""
        return Batches(self.train, self.scale.size, self.scale.batch_size, training=True)

    def calibration(self) -> Batches:
        """As they are, shuffled."""
        images = self.train.some(self.scale.calibration)
        return Batches(images, self.scale.size, self.scale.batch_size, training=True, augment=False)

    def trained(self, model: nn.Module, images: int, lr: float, teacher: nn.Module | None) -> nn.Module:
        """The model, in place, after so many images, in eval mode."""
        loader, steps = self.loader(), images // self.scale.batch_size
        if steps < 1:
            return model.eval()
        how = self.scale.objective(lr) | ({} if teacher else {"distill_weight": 0.0})
        epochs = steps / len(loader)
        config = nvit.FinetuneConfig(epochs=epochs, min_lr=lr / 100, warmup_epochs=0.05 * epochs, **how)
        return nvit.finetune(model, loader, config, teacher=teacher).eval()

    @torch.inference_mode()
    def right(self, model: nn.Module, images: Images | None = None) -> Tensor:
        """Right or wrong by evaluation image."""
        batches = Batches(images or self.val, self.scale.size, max(100, self.scale.batch_size), training=False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.scale.amp == "bf16"):
            return answers(model.eval(), batches).cpu()

    def missing(self, method: str) -> tuple[float, ...]:
        """Targets at which a method has no row of a model."""
        return tuple(t for t in self.scale.targets if self.row(t, method) is None)

    def run(self, method: str) -> None:
        """Rows of a method at every target, unless they are there."""
        for target, path in self.made(method).items():
            known, model = nvit.snapshot.load_metrics(path), nvit.load(path, device=str(self.device))
            before = self.right(model, self.val.some(len(self.val) // 5))
            lr, small = self.best(model, self.scale.images - known["seen"])
            nvit.snapshot.save(self.work / f"{method}-{target:g}", small)
            images, right = max(known["seen"], self.scale.images), self.right(small)
            self._add(target, method, small, images, known["prune_s"], right, before, lr=lr)

    def made(self, method: str) -> dict[float, Path]:
        """Snapshots of a method's models that have no row yet, as pruning leaves them, made unless they are there."""
        paths = {t: self.work / f"{method}-{t:g}-untrained" for t in self.missing(method)}
        if new := tuple(t for t, path in paths.items() if not path.exists()):
            # A CPU may be shared with others; on a GPU it is the device that takes the time.
            clock = time.process_time if self.device.type == "cpu" else time.perf_counter
            start, scale = clock(), self.scale
            self.scale = replace(scale, targets=new)
            try:
                found = METHODS[method](self)
            finally:
                self.scale = scale
            seconds = (clock() - start) / len(found)
            for t, (model, seen) in found.items():
                nvit.snapshot.save(paths[t], model, {"seen": seen, "prune_s": seconds})
            say(f"{method}: pruned in {seconds * len(found):.1f} s")
        return paths

    def best(self, model: nn.Module, images: int) -> tuple[float, nn.Module]:
        """The learning rate with which the model knows most of the images held back, and what it is then."""
        tried = {lr: self.trained(copy.deepcopy(model), images, lr, self.dense) for lr in self.scale.rates}
        known = {lr: float(self.right(small, self.held).mean()) for lr, small in tried.items()}
        lr = max(known, key=known.__getitem__)
        return lr, tried[lr]

    def _add(
        self, target: float, method: str, model: nn.Module, images: int, seconds: float, right: Tensor,
        before: Tensor | None = None, lr: float | None = None,
    ) -> None:  # fmt: skip
        row: dict[str, Any] = {"target": target, "method": method, "top1": 100 * float(right.mean())}
        row |= {"untrained": "" if before is None else 100 * float(before.mean())} | size(model)
        if method != "dense":
            row |= self.latency(model)
        row |= {"size": self.scale.size, "trained_on": images, "lr": lr or self.scale.rates[-1]}
        row |= {"evaluated": len(right), "prune_s": seconds}
        self.rows.add(**row, right=bits(right))
        shown = ("top1", "untrained", "measured_ratio", "trained_on", "lr")
        say(
            f"{method}: " + ", ".join(f"{key} {row[key]:.4g}" for key in shown if isinstance(row.get(key), float | int))
        )

    def latency(self, model: nn.Module) -> dict[str, float]:
        """As a share of dense, with its spread, as models are served on this device."""
        mode, dtype = as_deployed(self.device)
        pair = [in_dtype(m, dtype) for m in (self.dense, model)]
        images = sample_images(pair[0], self.scale.latency_batch)
        found = measured(pair, images, 2 * self.scale.seconds, mode)[1]
        return {key: found[key] for key in ("measured_ratio", "measured_spread", "latency_ms")}

    def prune(self, loader=None, **how: Any) -> nvit.PruneResult:
        """`nvit.prune` of a copy of the dense model."""
        fixed = {"latency_target": self.scale.targets, "measure_seconds": self.scale.seconds}
        fixed |= {"batch_size": self.scale.batch_size, "images": self.scale.calibration}
        config = nvit.PruneConfig(**(fixed | how))
        return nvit.prune(copy.deepcopy(self.dense), loader or self.calibration(), config, self.table)

    @property
    def scores(self) -> Mapping[str, Tensor]:
        """What units are worth before a refit, of the calibration images; asked once."""
        if self._scores is None:
            config = nvit.PruneConfig(train=False, criterion="curvature", measure_seconds=0.0)
            pruner = nvit.Pruner(copy.deepcopy(self.dense), self.table, config)
            for x, y in self.calibration():
                pruner.score(x, y)
            self._scores = {name: score.cpu() for name, score in pruner.scores().items()}
        return self._scores


def one_shot(contest: Contest, **how: Any) -> Made:
    result = contest.prune(train=False, **how)
    return {p.target: (p.model, 0) for p in result.snapshots}


def iterative(contest: Contest) -> Made:
    """Prunes while it trains towards the dense model; at each target so many images have been seen: more than
    `pruning_images` where it takes longer than was thought."""
    scale = contest.scale
    steps = max(1, scale.pruning_images // scale.batch_size)
    interval = max(1, round(steps / scale.decisions))
    result = contest.prune(
        contest.loader(),
        train=True,
        interval=interval,
        bundles_per_step=-(-bundles_to(contest, min(scale.targets)) // max(1, steps // interval)),
        **scale.objective(scale.rates[0]),
    )
    made = {}
    for p in result.snapshots:
        step = next(r["step"] for r in result.history if r["predicted_ratio"] <= p.predicted_ratio)
        made[p.target] = (p.model, step * scale.batch_size)
    return made


def bundles_to(contest: Contest, target: float) -> int:
    """About how many bundles leave on the way to a target: what one shot takes by the same table."""
    model = copy.deepcopy(contest.dense)
    groups = adapters.find(model).groups(model)
    full = full_masks(groups)
    masks, _ = drop_to_target(contest.scores, full, groups, contest.table, target * contest.table.dense_ms)
    return sum(-(-int((~masks[g.name]).sum()) // g.multiple) for g in groups)


def shaped(contest: Contest, of: str) -> Made:
    return {
        t: (shapes.shaped(contest.dense, contest.scores, contest.table, contest.clock, of, t), 0)
        for t in contest.scale.targets
    }


def torch_pruning(contest: Contest, **options: Any) -> Made:
    theirs = contest.host()
    theirs.load_state_dict(contest.dense.state_dict())
    theirs = shapes.with_gradients(theirs.to(contest.device).eval(), list(contest.calibration())).cpu()
    size = contest.scale.size
    return {
        t: (shapes.by_torch_pruning(contest.dense, theirs, contest.clock, t, size, **options), 0)
        for t in contest.scale.targets
    }


METHODS: dict[str, Callable[[Contest], Made]] = {
    OURS[0]: lambda c: one_shot(c, refit=True),
    OURS[1]: iterative,
    PEERS[0]: torch_pruning,
    PEERS[1]: lambda c: torch_pruning(c, isomorphic=True),
    PEERS[2]: lambda c: shaped(c, "uniform"),
    PEERS[3]: lambda c: shaped(c, "revit"),
    PEERS[4]: lambda c: one_shot(c, criterion="magnitude"),
    PEERS[5]: lambda c: one_shot(c, criterion="random"),
}


def needed(methods: Iterable[str]) -> str:
    """What has to be installed before these methods can run, as a line; empty where all is there."""
    if any(m.startswith("Torch-Pruning") for m in methods) and find_spec("torch_pruning") is None:
        return "Torch-Pruning is not installed; pip install 'nvit[bench]'"
    return ""


def compare(rows: Resumed) -> None:
    """Say in our rows how many points they are ahead of the best peer at that target, with the 95 % interval."""
    there = [r for r in rows.rows if not r.get("failed")]
    for row in [r for r in there if r["method"] in OURS]:
        beside = [r for r in there if r["method"] in PEERS and str(r["target"]) == str(row["target"])]
        if not beside:
            continue
        best = max(beside, key=lambda r: float(r["top1"]))
        mine, theirs = (answered(r["right"], int(r["evaluated"])) for r in (row, best))
        d = paired_bootstrap(mine, theirs)
        row |= {"best_peer": best["method"], "ahead": round(100 * d.mean, 3)}
        row |= {"ahead_low": round(100 * d.low, 3), "ahead_high": round(100 * d.high, 3)}
    rows.save()
