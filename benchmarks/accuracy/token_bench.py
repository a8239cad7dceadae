"""Real models whose tokens merge, their images, and the folder where what was made of them stays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import nvit
from benchmarks.accuracy.library import BATCH, INPUT, MODEL, answers, data_folder
from benchmarks.accuracy.peers import with_gradients
from benchmarks.engine.torch_pruning_vit import narrowed
from nvit import adapters
from nvit.analysis.compare import measured
from nvit.cli.flags import DataFlags, ModelFlags
from nvit.cli.inputs import open_evaluation_data, open_images
from nvit.cli.models import open_model
from nvit.latency.clock import as_deployed
from nvit.latency.measure import sample_images
from nvit.latency.table import LatencyTable
from nvit.prune.polish import polish_
from nvit.prune.tokens import schedules, work_of
from nvit.utils.report import write_csv

MODELS = (MODEL, "vit_tiny_patch16_224")
LATENCY_BATCH, LATENCY_SECONDS, TABLE_SECONDS = (8, 256), (8.0, 1.0), (40.0, 15.0)
"""Images, and seconds of a measurement and of a table: on a CPU, on a GPU."""
POLISH, AIMED = 200, 3
"""Steps; times that the aim at a latency is taken."""
RECIPES = {
    "joint": {"only": ("widths", "tokens")},
    "sharp": {"only": ("widths", "tokens"), "coarse": 0.0},
    "widths": {"only": ("widths",)},
    "depth": {"only": ("widths",), "depth": True},
}
"""Of the methods that are one run of the library."""


class TokenBench:
    """One model, its images, and the folder where what was made of it stays."""

    def __init__(
        self, name: str, of: str, images: int, work: Path, cost: str = "auto", device: str | torch.device = "cpu"
    ) -> None:
        data, self.cost, self.device = data_folder(), cost, torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.batch, self.seconds, self.table_seconds = (
            pair[on_gpu] for pair in (LATENCY_BATCH, LATENCY_SECONDS, TABLE_SECONDS)
        )
        self.mode, self.dtype = as_deployed(self.device)
        self.name, self.of, self.images, self.work = name, of, images, work / f"{name}-{of}-{images}"
        self.where = DataFlags(
            data=f"{data}/imagenet_sample1000/val",
            eval_data=f"{data}/imagenet_val1300",
            class_map=f"{data}/imagenet_synsets.txt",
            resize=False,
            workers=0,
        )
        self.checkpoint = f"{data}/{name}.safetensors"
        self.plain = self.open()
        self.evaluation: list | None = None
        self.peer: nn.Module | None = None

    def open(self) -> nn.Module:
        return open_model(self.name, ModelFlags(checkpoint=self.checkpoint), self.device)

    def table(self) -> LatencyTable:
        if self.of == "macs":
            return LatencyTable.analytic(self.plain)
        file = self.work / "latency_table.json"
        if not file.exists():
            LatencyTable.measure(self.plain, self.batch, self.device, seconds=self.table_seconds).save(file)
        return LatencyTable.load(file)

    def folder(self, method: str, target: float) -> Path:
        return self.work / method / f"target-{target:g}"

    def prune(self, method: str, targets: Sequence[float]) -> None:
        """Snapshots of one run of the library at several targets, unless they are there."""
        if all(self.folder(method, t).exists() for t in targets):
            return
        if method == "ToMe":
            return self.uniform(targets)
        if method == "polished":
            return self.polish(targets)
        if method == "Torch-Pruning":
            return None
        config, model = self.config(latency_target=tuple(targets), **RECIPES[method]), self.open()
        loader = self.calibration(config)
        told = lambda done, total, text: print(f"{text} {done}/{total}", file=sys.stderr)  # noqa: E731
        run = nvit.prune(model, loader, config, self.table(), out=self.work / method, resume=True, progress=told)
        named = {"model": self.name, "of": self.of, "method": method}
        write_csv(self.work / f"{method}-history.csv", [named | row for row in run.history])

    def config(self, **more) -> nvit.PruneConfig:
        return nvit.PruneConfig(train=False, refit=True, cost=self.cost, images=self.images, batch_size=BATCH, **more)

    def calibration(self, config: nvit.PruneConfig):
        return open_images(self.plain, self.where, task="classification", witness="never").calibration(config)

    def polish(self, targets: Sequence[float]) -> None:
        """What `joint` left, polished."""
        config = self.config(polish=POLISH)
        loader = list(self.calibration(config))
        for t in targets:
            if self.folder("polished", t).exists() or not self.folder("joint", t).exists():
                continue
            path = self.folder("joint", t)
            model, metrics = nvit.load(path), nvit.snapshot.load_metrics(path)
            found = polish_(model, self.plain, loader, config)
            print(f"{self.name}, {t:g}: {found}", file=sys.stderr)
            nvit.snapshot.save(self.folder("polished", t), model, metrics | {"distance": found["polish_after"]})

    def uniform(self, targets: Sequence[float]) -> None:
        """As many tokens in every block, at a share of the multiply-accumulates or of the latency."""
        work = work_of(adapters.merge_(self.plain, ()))
        for t in targets:
            if self.folder("ToMe", t).exists():
                continue
            share = t
            for _ in range(1 if self.of == "macs" else AIMED):
                merges = schedules(self.plain, lambda m, share=share: work(m) <= share * work(()))["uniform"]
                model = adapters.merge_(self.open(), merges)
                if self.of == "latency":
                    share += t - self.latency(model)["latency"]
            nvit.snapshot.save(self.folder("ToMe", t), model, {"predicted_ratio": work(merges) / work(())})

    def narrowed(self, target: float) -> nn.Module:
        """Torch-Pruning's model of a share of the multiply-accumulates."""
        if self.peer is None:
            self.peer = with_gradients(self.checkpoint, list(self.calibration(self.config())), self.name)
        return narrowed(self.peer, target, None, input_size=INPUT)[0]

    def kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Right or wrong by image, made once and kept by name."""
        file = self.work / f"{name}.pt"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(make(), file)
        return torch.load(file)

    def right(self, name: str, model: Callable[[], nn.Module]) -> Tensor:
        """Right or wrong by evaluation image."""

        def make() -> Tensor:
            if self.evaluation is None:
                batches = open_evaluation_data(self.plain, self.where, BATCH)
                self.evaluation = [(x.to(self.device), y.to(self.device)) for x, y in batches]
            return answers(model().eval().to(self.device), self.evaluation).cpu()

        return self.kept(name, make)

    def latency(self, model: nn.Module) -> dict[str, float]:
        """As a fraction of the dense model's."""
        images = sample_images(self.plain, self.batch).to(self.dtype)
        dense, found = measured([self.plain, model.to(self.device)], images, self.seconds, self.mode)
        row = {"latency": found["measured_ratio"], "latency_spread": found["measured_spread"]}
        speeds = {"images_per_s": found["images_per_s"], "dense_images_per_s": dense["images_per_s"]}
        return row | (speeds if self.device.type == "cuda" else {})
