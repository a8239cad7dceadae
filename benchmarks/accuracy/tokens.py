"""Top-1 lost by DeiT-Ti and ViT-Ti when tokens merge, alone and behind pruned widths; no training, no labels.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.tokens [tokens joint] [--models NAME …] [--images 128]

`tokens`: schedules of each family at shares of MACs; `chosen` is the one of least KL on calibration images of
imagenet_sample1000, as `merge_to` chooses. `joint`: widths to 0.8 by measured costs, refitted, and then tokens. All of
imagenet_val1300 is evaluated, cropped without resizing; `lost` is in points against the dense model on the same images:
of all, of the even places, on which settings may be chosen, and of the odd ones. `low` and `high` are the 95 % interval
of `lost` (paired bootstrap over images). Writes tokens_<section>_cpu.csv in benchmarks/results.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from torch import nn

from benchmarks import harness
from benchmarks.accuracy.library import MODEL, Bench, answers, data_folder
from benchmarks.accuracy.paired import paired_bootstrap
from nvit import adapters, tasks
from nvit.prune.tokens import merge_to
from nvit.refit.costs import measure_costs
from nvit.selection.curves import priced
from nvit.selection.lagrangian import drop_to_target
from nvit.structure.masks import full_masks

MODELS = (MODEL, "vit_tiny_patch16_224")
TARGETS = (0.8, 0.65, 0.5, 0.4)
WIDTHS_TO = 0.8
"""Of MACs, before tokens merge in `joint`."""


class TokenBench:
    """Rows of one model."""

    def __init__(self, name: str, images: int, evaluate: int) -> None:
        self.name, self.bench = name, Bench(data_folder(), images, evaluate, name)
        self.batches = [x for x, _ in self.bench.calibration]

    def row(self, target: float, ratio: float, model: nn.Module) -> dict[str, object]:
        """Points lost by a model."""
        right, dense = answers(model, self.bench.evaluation), self.bench.dense
        found = paired_bootstrap(dense.tolist(), right.tolist())
        halves = (100 * float((dense - right)[half::2].mean()) for half in (0, 1))
        lost = dict(zip(("lost_even", "lost_odd"), halves, strict=True))
        points = {"lost": 100 * found.mean, "low": 100 * found.low, "high": 100 * found.high}
        return {"model": self.name, "target": target, "ratio": ratio} | points | lost | {"images": len(right)}

    def tokens(self, records: harness.Records) -> None:
        for target in TARGETS:
            model = adapters.merge_(copy.deepcopy(self.bench.plain), ())
            found = merge_to(model, target, self.batches)
            row = self.row(target, found["ratio"], model)
            records.add(**row, family=found["family"], kl=found["kl"][found["family"]],
                        other_kl=max(found["kl"].values()), merges=" ".join(map(str, found["merges"])))  # fmt: skip

    def joint(self, records: harness.Records) -> None:
        bench, full, scores = self.bench, full_masks(self.bench.groups), self.bench.remaining()
        task = tasks.of("auto", bench.model)
        curves = measure_costs(bench.model, bench.groups, scores, self.batches, task=task, statistics=bench.seen)
        prices = scores | {
            g.name: priced(g, scores[g.name], full[g.name], curves[g.name]) for g in bench.groups if g.name in curves
        }
        masks, _ = drop_to_target(prices, full, bench.groups, bench.table, WIDTHS_TO * bench.table.dense_ms)
        small = bench.pruned(masks, refit=True)
        for target in TARGETS:
            model, found = copy.deepcopy(small), None
            if target < WIDTHS_TO:
                found = merge_to(model, target, self.batches, dense=bench.plain)
            row = self.row(target, WIDTHS_TO if found is None else found["ratio"], model)
            records.add(**row, family="" if found is None else found["family"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=("tokens", "joint"), default=["tokens", "joint"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--images", type=int, default=128, help="calibration images")
    parser.add_argument("--evaluate", type=int, default=0, help="evaluation images; 0 for all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = {section: harness.Records(f"tokens_{section}") for section in args.sections}
    for name in args.models:
        bench = TokenBench(name, args.images, args.evaluate)
        for section, rows in records.items():
            getattr(bench, section)(rows)
            rows.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
