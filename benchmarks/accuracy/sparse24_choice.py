"""Top-1 of DeiT-Ti and ViT-Ti after 2:4 in one shot, no training: which two of four stay by magnitude, or by curvature.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.sparse24_choice [magnitude/given …] [--models NAME …] [--images 512]
    NVIT_DATA=FOLDER python -m benchmarks.accuracy.sparse24_choice curvature/found --damping 0.03 --tune

All 48 projections of the blocks, as `nvit sparsify` makes them, channels in the given order or in the one it finds.
Calibration on images of imagenet_sample1000, labels unread; all of imagenet_val1300 is evaluated, cropped without
resizing, and reported as a whole and by halves: what was tuned (on DeiT-Ti), was tuned on the even places. `--tune`
evaluates these alone. `gain` is over magnitude in the given order, with its 95 % interval (paired bootstrap over
images). `seconds`: CPU time of order and choice. Rows go into sparse24_choice_cpu.csv; those of other points stay.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.accuracy.library import BATCH, MODEL, answers, data_folder, logits
from benchmarks.accuracy.paired import kl, paired_bootstrap
from nvit import sparse24
from nvit.cli.flags import DataFlags, ModelFlags
from nvit.cli.inputs import open_images
from nvit.cli.models import open_model
from nvit.cli.sparsify import calibration

MODELS = (MODEL, "vit_tiny_patch16_224")
CASES = ("dense", "magnitude/given", "magnitude/found", "curvature/given", "curvature/found")
KEY = ("model", "choice", "order", "images", "damping", "half")
ORDER_SECONDS = 60.0


class Bench:
    """One model, its calibration images, and the images that it is evaluated on."""

    def __init__(self, root: Path, name: str, images: int, tune: bool) -> None:
        self.name, self.half = name, "even" if tune else "all"
        self.model = open_model(name, ModelFlags(checkpoint=f"{root}/{name}.safetensors"), torch.device("cpu")).eval()
        opened = open_images(
            self.model,
            DataFlags(
                data=f"{root}/imagenet_sample1000/val",
                eval_data=f"{root}/imagenet_val1300",
                class_map=f"{root}/imagenet_synsets.txt",
                resize=False,
            ),
        )
        self.calibration = list(calibration(opened, images, seed=0))
        found = list(opened.evaluation(BATCH))
        self.x, self.y = (torch.cat(part) for part in zip(*found, strict=True))
        if tune:
            self.x, self.y = self.x[::2], self.y[::2]
        self.exact: Tensor | None = None

    def answers(self, model: nn.Module) -> Tensor:
        """Right or wrong by evaluation image."""
        return answers(model, list(zip(self.x.split(BATCH), self.y.split(BATCH), strict=True)))

    def sparse(self, choice: str, order: str, damping: float) -> tuple[nn.Module, float]:
        """A 2:4 copy of the model, and the seconds that it took a CPU."""
        model, start = copy.deepcopy(self.model), time.process_time()
        if order == "found":
            sparse24.permute_(model, ORDER_SECONDS)
        masks = sparse24.masks_2to4(model)
        if choice == "curvature":
            sparse24.choose_by_curvature_(model, self.calibration, list(masks), damping=damping)
        else:
            sparse24.apply_masks_(model, masks)
        return model, time.process_time() - start

    def divergence(self, model: nn.Module) -> float:
        """Mean KL divergence from the dense model's answers, in nats."""
        if self.exact is None:
            self.exact = logits(self.model, self.x)
        return float(kl(self.exact, logits(model, self.x)).mean())


def measure(bench: Bench, case: str, damping: float, records: harness.Records, base: Tensor | None) -> Tensor:
    """Adds the row of a case; right or wrong by image.

    Args:
        base: of magnitude in the given order.
    """
    choice, _, order = case.partition("/")
    row = {"model": bench.name, "choice": choice, "order": order or "given", "half": bench.half}
    model, seconds = (bench.model, 0.0) if choice == "dense" else bench.sparse(choice, order, damping)
    if choice == "curvature":
        row |= {"images": sum(len(x) for x in bench.calibration), "damping": damping}
    right = bench.answers(model)
    row["top1"] = 100 * float(right.mean())
    if bench.half == "all":
        row |= {"top1_even": 100 * float(right[::2].mean()), "top1_odd": 100 * float(right[1::2].mean())}
    if choice != "dense":
        row |= {"kl": bench.divergence(model), "seconds": seconds}
    if base is not None:
        d = paired_bootstrap(right.tolist(), base.tolist())
        row |= {"gain": 100 * d.mean, "low": 100 * d.low, "high": 100 * d.high}
    records.add(**row)
    return right


def save(records: harness.Records) -> None:
    """Rows measured now, and those of other points that the file has."""
    now = list(records.rows)
    measured = {_key(row) for row in now}
    kept = []
    if records.path.exists():
        with records.path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if _key(row) not in measured]
    records.rows = sorted(
        kept + now, key=lambda row: (row["half"], MODELS.index(row["model"]), CASES.index(_case(row)))
    )
    records.save()
    records.rows = now


def _case(row: Mapping) -> str:
    return row["choice"] if row["choice"] == "dense" else f"{row['choice']}/{row['order']}"


def _key(row: Mapping) -> tuple[str, ...]:
    return tuple(str(row.get(name, "")) for name in KEY)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    parser.add_argument("--damping", type=float, default=sparse24.DAMPING)
    parser.add_argument("--tune", action="store_true", help="evaluate the even places alone")
    args = parser.parse_args(arguments)
    if unknown := set(args.cases).difference(CASES):
        parser.error(f"no cases {sorted(unknown)}; there are {', '.join(CASES)}")
    torch.set_num_threads(1)
    root = data_folder()
    for name in args.models:
        bench = Bench(root, name, args.images, args.tune)
        records = harness.Records("sparse24_choice")
        base = None
        for case in args.cases or CASES:
            right = measure(bench, case, args.damping, records, base)
            base = right if case == "magnitude/given" else base
            save(records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
