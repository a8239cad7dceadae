"""Top-1 lost by DeiT-Ti and ViT-Ti, widths alone, one shot and refitted: groups priced by prediction or by measurement.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.refit_costs [predicted measured] [--models NAME …] [--images 300]

Calibration on images of imagenet_sample1000, labels unread; all of imagenet_val1300 is evaluated, cropped without
resizing. `lost` is in points against the dense model on the same images: of all, of the even places, on which settings
were chosen, and of the odd ones. `gain`: measured over predicted on all, with its 95 % interval (paired bootstrap over
images). Rows go into refit_costs_cpu.csv; those of other points stay. What every group was measured to cost, beside
what its scores predict, goes into cost_curves_cpu.csv.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.accuracy.library import MODEL, Bench, answers, data_folder
from benchmarks.accuracy.paired import paired_bootstrap
from nvit import tasks
from nvit.refit.costs import measure_costs
from nvit.selection.curves import Curve, priced
from nvit.selection.lagrangian import drop_to_target
from nvit.spec import KINDS
from nvit.structure.masks import full_masks, kept_counts, widths
from nvit.utils.memory import most_held

MODELS = (MODEL, "vit_tiny_patch16_224")
COSTS = ("predicted", "measured")
TARGETS = (0.8, 0.65, 0.5)
KEY = ("model", "target", "cost", "calibration")
CURVE_KEY = ("model", "group", "gone", "calibration")


def lost(right: Tensor, dense: Tensor) -> dict[str, float]:
    """Points of top-1 lost on all images and on both halves."""
    halves = {"": slice(None), "_even": slice(0, None, 2), "_odd": slice(1, None, 2)}
    return {f"lost{name}": 100 * float((dense[half] - right[half]).mean()) for name, half in halves.items()}


def measure(name: str, costs: Sequence[str], targets: Sequence[float], images: int, records: harness.Records) -> None:
    """Rows of one model."""
    bench = Bench(data_folder(), images, 0, name)
    full, scores = full_masks(bench.groups), {"predicted": bench.remaining()}
    more = {"predicted": {}}
    if "measured" in costs:
        start = time.process_time()
        told = lambda done, total, _: print(f"{done}/{total}, {time.process_time() - start:.0f} s", file=sys.stderr)  # noqa: E731
        curves = measure_costs(
            bench.model,
            bench.groups,
            scores["predicted"],
            [x for x, _ in bench.calibration],
            task=tasks.of("auto", bench.model),
            statistics=bench.seen,
            progress=told,
        )
        more["measured"] = {"cpu_s": time.process_time() - start}
        save_curves(name, images, bench, scores["predicted"], curves)
        scores["measured"] = scores["predicted"] | {
            g.name: priced(g, scores["predicted"][g.name], full[g.name], curves[g.name])
            for g in bench.groups
            if g.name in curves
        }
    for target in targets:
        found: dict[str, Tensor] = {}
        for cost in costs:
            masks, _ = drop_to_target(scores[cost], full, bench.groups, bench.table, target * bench.table.dense_ms)
            right = found[cost] = answers(bench.pruned(masks, refit=True), bench.evaluation)
            kept = kept_counts(masks)
            row = {"model": name, "target": target, "cost": cost, "calibration": images, "images": len(right)}
            row |= {"macs": bench.table.ratio(widths(bench.groups, masks)), "top1": 100 * float(right.mean())}
            row |= lost(right, bench.dense) | more[cost]
            row |= {f"kept_{k}": _share([(kept[g.name], g.size) for g in bench.groups if g.kind == k]) for k in KINDS}
            if len(found) == 2:
                d = paired_bootstrap(*(found[way].tolist() for way in reversed(COSTS)))
                row |= {"gain": 100 * d.mean, "low": 100 * d.low, "high": 100 * d.high}
            row["peak_mib"] = most_held(torch.device("cpu")) / 2**20
            records.add(**row)
            save(records, KEY)


def save_curves(
    name: str, images: int, bench: Bench, scores: Mapping[str, Tensor], curves: Mapping[str, Curve]
) -> None:
    """What each depth of each group was measured to cost, and what the scores of the units gone add up to."""
    records = harness.Records("cost_curves")
    for g in (g for g in bench.groups if g.name in curves):
        predicted = scores[g.name].sort().values.cumsum(0)
        for gone, cost in zip(curves[g.name].gone, curves[g.name].cost, strict=True):
            row = {"model": name, "calibration": images, "group": g.name, "kind": g.kind, "size": g.size, "gone": gone}
            records.add(**row, predicted=float(predicted[gone - 1]), measured=cost)
    save(records, CURVE_KEY)


def _share(counts: Sequence[tuple[int, int]]) -> float:
    kept, of = map(sum, zip(*counts, strict=True))
    return kept / of


def save(records: harness.Records, key: Sequence[str]) -> None:
    """Rows measured now, and those of other points that the file has."""
    now, kept = list(records.rows), []
    if records.path.exists():
        measured = {_key(row, key) for row in now}
        with records.path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if _key(row, key) not in measured]
    records.rows = sorted(kept + now, key=lambda row: MODELS.index(row["model"]))
    records.save()
    records.rows = now


def _key(row: Mapping, key: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in key)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("costs", nargs="*", metavar="COST", help=f"of {', '.join(COSTS)}; both by default")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    parser.add_argument("--images", type=int, default=300, help="calibration images")
    args = parser.parse_args(arguments)
    if unknown := set(args.costs).difference(COSTS):
        parser.error(f"no costs {sorted(unknown)}; there are {', '.join(COSTS)}")
    torch.set_num_threads(1)
    for name in args.models:
        measure(name, args.costs or COSTS, args.targets, args.images, harness.Records("refit_costs"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
