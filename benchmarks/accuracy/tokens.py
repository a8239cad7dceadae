"""Top-1 lost by DeiT-Ti and ViT-Ti when tokens merge, alone and with pruned widths; no training, no labels.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.tokens --work FOLDER [macs latency] [--models NAME …]

At each target, of multiply-accumulates (`macs`) or of latency measured on one CPU thread (`latency`):
`joint`, what `nvit prune --no-train --refit --only widths tokens` leaves; `polished`, the same after `--polish 200`;
`ToMe`, as many tokens merged in every block, with our op; `widths`, what it leaves without `tokens`; `Torch-Pruning`,
its models of as many multiply-accumulates by Taylor importance, which reads labels (needs `pip install torch-pruning`;
a target of latency is one of multiply-accumulates to it, and what it takes is measured).

Calibration on images of imagenet_sample1000, labels unread; all of imagenet_val1300 is evaluated, cropped without
resizing. `lost` is in points against the dense model on the same images, with its 95 % interval (paired bootstrap over
images), of all, of the even places and of the odd ones; `ahead` is how much less ours (`polished` where it is made)
loses than that method, likewise. `latency` is measured in turn with the dense model.

Every model and every answer is kept in --work, so that a run that was stopped goes on. Rows go into tokens_cpu.csv in
benchmarks/results, all candidates that were judged into tokens_candidates_cpu.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import nvit
from benchmarks import harness
from benchmarks.accuracy.library import BATCH, INPUT, MODEL, answers, data_folder
from benchmarks.accuracy.paired import paired_bootstrap
from benchmarks.engine.torch_pruning_vit import narrowed
from nvit import adapters
from nvit.analysis.compare import measured, size
from nvit.cli.flags import DataFlags, ModelFlags
from nvit.cli.inputs import open_evaluation_data, open_images
from nvit.cli.models import open_model
from nvit.latency.measure import sample_images
from nvit.latency.table import LatencyTable
from nvit.prune.polish import polish_
from nvit.prune.tokens import schedules, work_of
from nvit.structure.skeleton import tokens_by_block
from nvit.utils.report import write_csv

MODELS = (MODEL, "vit_tiny_patch16_224")
TARGETS = (0.8, 0.65, 0.5, 0.4)
LATENCY_BATCH, LATENCY_SECONDS = 8, 8.0
ONLY = {"joint": ("widths", "tokens"), "ToMe": ("tokens",), "widths": ("widths",)}
METHODS = ("joint", "polished", "ToMe", "widths", "Torch-Pruning")
OURS = ("joint", "polished")
"""The last of them that is there is compared with the others."""

POLISH, AIMED = 200, 3
"""Steps; times that the aim at a latency is taken."""

KEY = ("model", "of", "target", "method")


class TokenBench:
    """One model, its images, and the folder where what was made of it stays."""

    def __init__(self, name: str, of: str, images: int, work: Path, cost: str = "auto", amp: str = "no") -> None:
        data, self.cost, self.amp = data_folder(), cost, amp
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
        return open_model(self.name, ModelFlags(checkpoint=self.checkpoint), torch.device("cpu"))

    def table(self) -> LatencyTable:
        if self.of == "macs":
            return LatencyTable.analytic(self.plain)
        file = self.work / "latency_table.json"
        if not file.exists():
            LatencyTable.measure(self.plain, LATENCY_BATCH).save(file)
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
        config, model = self.config(only=ONLY[method], latency_target=tuple(targets)), self.open()
        loader = self.calibration(config)
        told = lambda done, total, text: print(f"{text} {done}/{total}", file=sys.stderr)  # noqa: E731
        run = nvit.prune(model, loader, config, self.table(), out=self.work / method, resume=True, progress=told)
        named = {"model": self.name, "of": self.of, "method": method}
        write_csv(self.work / f"{method}-history.csv", [named | row for row in run.history])

    def config(self, **more) -> nvit.PruneConfig:
        return nvit.PruneConfig(
            train=False, refit=True, cost=self.cost, images=self.images, batch_size=BATCH, amp=self.amp, **more
        )

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
                merges = schedules(self.plain, lambda _, m, share=share: work(m) <= share * work(()))["uniform"]
                model = adapters.merge_(self.open(), merges)
                if self.of == "latency":
                    share += t - self.latency(model)["latency"]
            nvit.snapshot.save(self.folder("ToMe", t), model, {"predicted_ratio": work(merges) / work(())})

    def narrowed(self, target: float) -> nn.Module:
        """Torch-Pruning's model of a share of the multiply-accumulates."""
        if self.peer is None:
            self.peer = self.open().eval()
            batches = list(self.calibration(self.config()))
            for x, y in batches:
                (functional.cross_entropy(self.peer(x), y) / len(batches)).backward()
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
                self.evaluation = list(open_evaluation_data(self.plain, self.where, BATCH))
            return answers(model().eval(), self.evaluation)

        return self.kept(name, make)

    def rows(self, methods: Sequence[str], targets: Sequence[float], records: harness.Records) -> None:
        dense = self.right("dense", self.open)
        for target in targets:
            joint = None
            for method in methods:
                path, metrics, tokens = self.folder(method, target), {}, [adapters.find(self.plain).tokens(self.plain)]
                if method == "Torch-Pruning":
                    model = self.narrowed(target)
                elif path.exists():
                    model, metrics = nvit.load(path), nvit.snapshot.load_metrics(path)
                    tokens = tokens_by_block(nvit.snapshot.load_spec(path))
                else:
                    continue
                right = self.right(f"{method}-{target:g}", lambda model=model: model)
                row = {"model": self.name, "of": self.of, "target": target, "method": method}
                row |= {"cost": self.cost if method in (*OURS, "widths") else ""}
                row |= {"macs": size(model)["macs"] / size(self.plain)["macs"]} | self.latency(model)
                row |= {
                    key: metrics.get(key, "") for key in ("predicted_ratio", "widths_ratio", "schedule", "distance")
                }
                row |= {
                    "tokens_left": tokens[-1],
                    "top1": 100 * float(right.mean()),
                    "dense": 100 * float(dense.mean()),
                }
                row |= points("lost", dense, right)
                row |= {
                    f"lost_{half}": 100 * float((dense - right)[i::2].mean()) for i, half in enumerate(("even", "odd"))
                }
                joint = right if method in OURS else joint
                row |= points("ahead", joint, right) if joint is not None and method not in OURS else {}
                records.add(**row, images=len(right), calibration=self.images)
                save(records)

    def latency(self, model: nn.Module) -> dict[str, float]:
        """As a fraction of the dense model's."""
        _, found = measured([self.plain, model], sample_images(self.plain, LATENCY_BATCH), LATENCY_SECONDS)
        return {"latency": found["measured_ratio"], "latency_spread": found["measured_spread"]}


def candidates(work: Path) -> None:
    """Every candidate that runs in `work` judged, and at the end of each run what it took."""
    names = ("model", "of", "method", "target", "widths_ratio", "schedule", "predicted_ratio", "distance")
    rows = []
    for file in sorted(work.glob("*/*-history.csv")):
        with file.open(newline="") as text:
            rows += [{n: row[n] for n in names} for row in csv.DictReader(text) if row.get("schedule")]
    write_csv(harness.RESULTS / "tokens_candidates_cpu.csv", rows)


def points(name: str, a: Tensor, b: Tensor) -> dict[str, float]:
    """Mean of `a - b` in points, and its 95 % interval."""
    found = paired_bootstrap(a.tolist(), b.tolist())
    return {name: 100 * found.mean, f"{name}_low": 100 * found.low, f"{name}_high": 100 * found.high}


def save(records: harness.Records) -> None:
    """Rows measured now, and those of other points that the file has."""
    now, kept = list(records.rows), []
    if records.path.exists():
        mine = {tuple(str(row[k]) for k in KEY) for row in now}
        with records.path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if tuple(row[k] for k in KEY) not in mine]
    order = {name: i for i, name in enumerate((*MODELS, "macs", "latency", *METHODS))}
    records.rows = sorted(
        kept + now, key=lambda r: (order[r["model"]], order[r["of"]], -float(r["target"]), order[r["method"]])
    )
    records.save()
    records.rows = now


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("of", nargs="*", choices=("macs", "latency"), default=["macs", "latency"])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and answers")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS[:-1])
    parser.add_argument("--cost", default="auto", help="what units of a group cost, as nvit prune --cost")
    parser.add_argument("--amp", default="no", help="of polishing, as nvit prune --amp")
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    parser.add_argument("--images", type=int, default=1000, help="calibration images")
    parser.add_argument("--only-prune", action="store_true", help="make the models, evaluate nothing yet")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    records = harness.Records("tokens")
    for name in args.models:
        for of in args.of:
            bench = TokenBench(name, of, args.images, args.work, args.cost, args.amp)
            for method in args.methods:
                bench.prune(method, args.targets)
            candidates(args.work)
            if not args.only_prune:
                bench.rows(args.methods, args.targets, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
