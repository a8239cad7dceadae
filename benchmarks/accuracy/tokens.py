"""Top-1 lost by DeiT-Ti and ViT-Ti when tokens merge, alone and with pruned widths; no training, no labels.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.tokens --work FOLDER [macs latency] [--models NAME …]

At each target, of multiply-accumulates (`macs`) or of latency measured on one CPU thread (`latency`):
`joint`, what `nvit prune --no-train --refit --only widths tokens` leaves; `ToMe`, as many tokens merged in every block,
with our op; `widths`, what it leaves without `tokens`. Calibration on images of imagenet_sample1000, labels unread; all
of imagenet_val1300 is evaluated, cropped without resizing. `lost` is in points against the dense model on the same
images, with its 95 % interval (paired bootstrap over images), of all, of the even places and of the odd ones; `ahead`
is how much less `joint` loses than that method, likewise. `latency` is measured in turn with the dense model.

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

import nvit
from benchmarks import harness
from benchmarks.accuracy.library import BATCH, MODEL, answers, data_folder
from benchmarks.accuracy.paired import paired_bootstrap
from nvit import adapters
from nvit.analysis.compare import measured, size
from nvit.cli.flags import DataFlags, ModelFlags
from nvit.cli.inputs import open_evaluation_data, open_images
from nvit.cli.models import open_model
from nvit.latency.measure import sample_images
from nvit.latency.table import LatencyTable
from nvit.prune.tokens import schedules, work_of
from nvit.structure.skeleton import tokens_by_block
from nvit.utils.report import write_csv

MODELS = (MODEL, "vit_tiny_patch16_224")
TARGETS = (0.8, 0.65, 0.5, 0.4)
LATENCY_BATCH, LATENCY_SECONDS = 8, 20.0
METHODS = {"joint": ("widths", "tokens"), "ToMe": ("tokens",), "widths": ("widths",)}
KEY = ("model", "of", "target", "method")


class TokenBench:
    """One model, its images, and the folder where what was made of it stays."""

    def __init__(self, name: str, of: str, images: int, work: Path) -> None:
        data = data_folder()
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
        if method == "ToMe" and self.of == "macs":
            return self.uniform(targets)
        config = nvit.PruneConfig(
            train=False,
            refit=method != "ToMe",
            only=METHODS[method],
            latency_target=tuple(targets),
            images=self.images,
            batch_size=BATCH,
        )
        model = self.open()
        loader = open_images(model, self.where, task="classification", witness="never").calibration(config)
        told = lambda done, total, text: print(f"{text} {done}/{total}", file=sys.stderr)  # noqa: E731
        run = nvit.prune(model, loader, config, self.table(), out=self.work / method, resume=True, progress=told)
        named = {"model": self.name, "of": self.of, "method": method}
        write_csv(self.work / f"{method}-history.csv", [named | row for row in run.history])

    def uniform(self, targets: Sequence[float]) -> None:
        """As many tokens in every block, at a share of the multiply-accumulates."""
        work = work_of(adapters.merge_(self.plain, ()))
        for t in targets:
            merges = schedules(self.plain, lambda _, m, t=t: work(m) <= t * work(())).get("uniform")
            if merges is None:
                print(
                    f"{self.name}: as many tokens in every block do not come down to {t:g} of the MACs", file=sys.stderr
                )
                continue
            model = adapters.merge_(self.open(), merges)
            nvit.snapshot.save(self.folder("ToMe", t), model, {"predicted_ratio": work(merges) / work(())})

    def right(self, name: str, model: Callable[[], nn.Module]) -> Tensor:
        """Right or wrong by evaluation image, kept by name."""
        file = self.work / f"{name}.pt"
        if not file.exists():
            if self.evaluation is None:
                self.evaluation = list(open_evaluation_data(self.plain, self.where, BATCH))
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(answers(model().eval(), self.evaluation), file)
        return torch.load(file)

    def rows(self, methods: Sequence[str], targets: Sequence[float], records: harness.Records) -> None:
        dense = self.right("dense", self.open)
        for target in targets:
            joint = None
            for method in methods:
                path = self.folder(method, target)
                if not path.exists():
                    continue
                model, metrics = nvit.load(path), nvit.snapshot.load_metrics(path)
                right = self.right(f"{method}-{target:g}", lambda model=model: model)
                tokens = tokens_by_block(nvit.snapshot.load_spec(path))
                row = {"model": self.name, "of": self.of, "target": target, "method": method}
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
                joint = right if method == "joint" else joint
                row |= points("ahead", joint, right) if joint is not None and method != "joint" else {}
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
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    parser.add_argument("--images", type=int, default=300, help="calibration images")
    parser.add_argument("--only-prune", action="store_true", help="make the models, evaluate nothing yet")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    records = harness.Records("tokens")
    for name in args.models:
        for of in args.of:
            bench = TokenBench(name, of, args.images, args.work)
            for method in args.methods:
                bench.prune(method, args.targets)
            candidates(args.work)
            if not args.only_prune:
                bench.rows(args.methods, args.targets, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
