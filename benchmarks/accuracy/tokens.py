"""Top-1 lost by DeiT-Ti and ViT-Ti when tokens merge, alone and with pruned widths; no training, no labels.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.tokens --work FOLDER [macs latency] [--models NAME …]

At each target, of multiply-accumulates (`macs`) or of measured latency (`latency`: on one CPU thread, eager, in
float32; with `--device cuda` graph replays in bfloat16):
`joint`, what `nvit prune --no-train --refit --only widths tokens` leaves; `sharp`, the same with `--coarse 0`;
`polished`, `joint` after `--polish 200`; `ToMe`, as many tokens merged in every block, with our op; `widths`, what it
leaves without `tokens`; `depth`, the same with `--depth`; `Torch-Pruning`, its models of as many multiply-accumulates
by Taylor importance, which reads labels (needs `pip install torch-pruning`; a target of latency is one of
multiply-accumulates to it, and what it takes is measured).

Calibration on images of imagenet_sample1000, labels unread; all of imagenet_val1300 is evaluated, cropped without
resizing. `lost` is in points against the dense model on the same images, with its 95 % interval (paired bootstrap over
images), of all, of the even places and of the odd ones; `ahead` is how much less ours (`polished` where it is made)
loses than that method, likewise. `latency` is measured in turn with the dense model.

Every model and every answer is kept in --work, so that a run that was stopped goes on. Rows go into tokens_cpu.csv in
benchmarks/results, all candidates that were judged into tokens_candidates_cpu.csv; a GPU's into <GPU>_tokens.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nvit
from benchmarks import harness
from benchmarks.accuracy.paired import paired_bootstrap
from benchmarks.accuracy.rows import Resumed
from benchmarks.accuracy.token_bench import MODELS, RECIPES, TokenBench
from nvit import adapters
from nvit.analysis.compare import size
from nvit.structure.skeleton import tokens_by_block
from nvit.utils.report import write_csv

TARGETS = (0.8, 0.65, 0.5, 0.4)
METHODS = ("joint", "sharp", "polished", "ToMe", "widths", "depth", "Torch-Pruning")
OURS = ("joint", "polished")
"""The last of them that is there is compared with the others."""

KEY = ("model", "of", "target", "method")


def measure(bench: TokenBench, methods: Sequence[str], targets: Sequence[float], records: Resumed) -> None:
    """Rows of a model; methods without a model at a target have none."""
    dense = bench.right("dense", bench.open)
    for target in targets:
        joint = None
        for method in methods:
            path, metrics, tokens = bench.folder(method, target), {}, [adapters.find(bench.plain).tokens(bench.plain)]
            if method == "Torch-Pruning":
                model = bench.narrowed(target)
            elif path.exists():
                model, metrics = nvit.load(path, device=bench.device), nvit.snapshot.load_metrics(path)
                tokens = tokens_by_block(nvit.snapshot.load_spec(path))
            else:
                continue
            right = bench.right(f"{method}-{target:g}", lambda model=model: model)
            row = {"model": bench.name, "of": bench.of, "target": target, "method": method}
            row |= {"cost": bench.cost if method in ("polished", *RECIPES) else ""}
            row |= {"macs": size(model)["macs"] / size(bench.plain)["macs"]} | bench.latency(model)
            row |= {key: metrics.get(key, "") for key in ("predicted_ratio", "widths_ratio", "schedule", "distance")}
            row |= {
                "tokens_left": tokens[-1],
                "top1": 100 * float(right.mean()),
                "dense": 100 * float(dense.mean()),
            }
            row |= points("lost", dense, right)
            row |= {f"lost_{half}": 100 * float((dense - right)[i::2].mean()) for i, half in enumerate(("even", "odd"))}
            joint = right if method in OURS else joint
            row |= points("ahead", joint, right) if joint is not None and method not in (*OURS, "sharp") else {}
            records.add(**row, images=len(right), calibration=bench.images)


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


def order(row: Mapping[str, Any]) -> tuple:
    """Models and methods as listed, the largest target first."""
    of = ("macs", "latency").index(row["of"])
    return MODELS.index(row["model"]), of, -float(row["target"]), METHODS.index(row["method"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("of", nargs="*", choices=("macs", "latency"), default=["macs", "latency"])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and answers")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=("joint", "ToMe", "widths"))
    parser.add_argument("--cost", default="auto", help="what units of a group cost, as nvit prune --cost")
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    parser.add_argument("--images", type=int, default=1000, help="calibration images")
    parser.add_argument("--device", default="cpu", help="where models are pruned, timed and asked, as cuda")
    parser.add_argument("--out", type=Path, help="folder of the CSV; benchmarks/results by default")
    parser.add_argument("--only-prune", action="store_true", help="make the models, evaluate nothing yet")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    records = Resumed("tokens", KEY, args.device, args.out, order)
    for name in args.models:
        for of in args.of:
            bench = TokenBench(name, of, args.images, args.work, args.cost, args.device)
            for method in args.methods:
                bench.prune(method, args.targets)
            if args.device == "cpu":
                candidates(args.work)
            if not args.only_prune:
                measure(bench, args.methods, args.targets, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
