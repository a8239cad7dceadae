"""Top-1 lost by DeiT-Ti and ViT-Ti, widths alone, one shot and refitted: groups priced by prediction or by measurement.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.refit_costs [predicted between measured both] [--models NAME …]

Calibration on images of imagenet_sample1000, labels unread; imagenet_val1300 is evaluated, cropped without resizing.
`lost` is in points against the dense model on the same images: of all, of the even places, on which settings were
chosen, and of the odd ones. `gain`: over predicted, with its 95 % interval (paired bootstrap over images). `between`
prices by the geometric mean of prediction and measurement. `both` takes, of the three choices, the one with the lowest
`distance` to the dense model on calibration images held back, as `nvit prune --cost both` does.

Rows go into refit_costs_cpu.csv, each with its answers by image (`right`, a bit an image), so that points can be
measured on different days and compared image by image. What every group was measured to cost, beside what its scores
predict, goes into cost_curves_cpu.csv; curves that it has are not measured again unless `--again` is given.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.accuracy.library import MODEL, Bench, answers, data_folder
from benchmarks.accuracy.paired import answered, bits, paired_bootstrap
from benchmarks.accuracy.rows import Resumed
from nvit import tasks
from nvit.prune.prices import ways_to_price
from nvit.refit.costs import measure_costs
from nvit.selection.curves import Curve
from nvit.selection.lagrangian import drop_to_target
from nvit.spec import KINDS
from nvit.structure.masks import Masks, full_masks, kept_counts, widths
from nvit.utils.memory import most_held

MODELS = (MODEL, "vit_tiny_patch16_224")
COSTS = ("predicted", "between", "measured", "both")
TARGETS = (0.8, 0.65, 0.5)
KEY = ("model", "target", "cost", "calibration")
CURVE_KEY = ("model", "group", "gone", "calibration")


def lost(right: Tensor, dense: Tensor) -> dict[str, float]:
    """Points of top-1 lost on all images and on both halves."""
    halves = {"": slice(None), "_even": slice(0, None, 2), "_odd": slice(1, None, 2)}
    return {f"lost{name}": 100 * float((dense[half] - right[half]).mean()) for name, half in halves.items()}


def measure(name: str, costs: Sequence[str], targets: Sequence[float], images: int, again: bool) -> None:
    """Rows of one model."""
    bench = Bench(data_folder(), images, 0, name)
    records, more, scores, curves = ordered("refit_costs", KEY), {}, bench.remaining(), {}
    if set(costs) - {"predicted"}:
        start = time.process_time()
        curves = {} if again else known_curves(name, images)
        if not curves:
            curves = curves_of(bench, scores)
            more = {"cpu_s": time.process_time() - start}
            save_curves(name, images, bench, scores, curves)
    ways = ways_to_price(scores, bench.groups, full_masks(bench.groups), curves)
    judge = bench.judge() if "both" in costs else None
    for target in targets:
        masks = {way: chosen(bench, prices.units, target) for way, prices in ways.items()}
        distances = {way: float(judge.of(choice)) for way, choice in masks.items()} if judge else {}
        answered_by: dict[str, Tensor] = {}
        if distances:
            masks["both"] = masks[min(distances, key=distances.__getitem__)]
        for cost in costs:
            taken = min(distances, key=distances.__getitem__) if cost == "both" else cost
            if taken not in answered_by:  # `both` is one of the others
                answered_by[taken] = answers(bench.pruned(masks[taken], refit=True), bench.evaluation)
            right = answered_by[taken]
            kept = kept_counts(masks[cost])
            row = {"model": name, "target": target, "cost": cost, "calibration": images, "images": len(right)}
            row |= {"macs": bench.table.ratio(widths(bench.groups, masks[cost])), "top1": 100 * float(right.mean())}
            row |= lost(right, bench.dense) | (more if cost == "measured" else {})
            row |= {f"kept_{k}": _share([(kept[g.name], g.size) for g in bench.groups if g.kind == k]) for k in KINDS}
            row |= {"distance": distances[cost]} if cost in distances else {}
            row |= {"right": bits(right)} | gain(row, right, records)
            row["peak_mib"] = most_held(torch.device("cpu")) / 2**20
            records.add(**row)


def chosen(bench: Bench, scores: Mapping[str, Tensor], target: float) -> Masks:
    """What leaves at a share of the dense MACs."""
    return drop_to_target(scores, full_masks(bench.groups), bench.groups, bench.table, target * bench.table.dense_ms)[0]


def curves_of(bench: Bench, scores: Mapping[str, Tensor]) -> dict[str, Curve]:
    """Measured, with a line of progress now and then."""
    start = time.process_time()

    def told(done: int, total: int, _) -> None:
        print(f"{done}/{total}, {time.process_time() - start:.0f} s", file=sys.stderr)

    xs, task = [x for x, _ in bench.calibration], tasks.of("auto", bench.model)
    return measure_costs(bench.model, bench.groups, scores, xs, task=task, statistics=bench.seen, progress=told)


def gain(row: Mapping, right: Tensor, records: Resumed) -> dict[str, float]:
    """Points over the predicted choice of the same point, where there is one, on all images and on the odd ones."""
    beside = records.find(**row | {"cost": "predicted"})
    if row["cost"] == "predicted" or beside is None or not beside.get("right"):
        return {}
    before = answered(beside["right"], len(right))
    said = {}
    for part, places in (("", slice(None)), ("_odd", slice(1, None, 2))):
        d = paired_bootstrap(right.tolist()[places], before[places])
        said |= {f"gain{part}": 100 * d.mean, f"low{part}": 100 * d.low, f"high{part}": 100 * d.high}
    return said


def known_curves(name: str, images: int) -> dict[str, Curve]:
    """Curves of a model that the file has, for so many calibration images."""
    points: dict[str, list[tuple[int, float]]] = {}
    for r in ordered("cost_curves", CURVE_KEY).rows:
        if (r["model"], r["calibration"]) == (name, str(images)):
            points.setdefault(r["group"], []).append((int(r["gone"]), float(r["measured"])))
    return {group: Curve(*zip(*sorted(found), strict=True)) for group, found in points.items()}


def save_curves(
    name: str, images: int, bench: Bench, scores: Mapping[str, Tensor], curves: Mapping[str, Curve]
) -> None:
    """What each depth of each group was measured to cost, and what the scores of the units gone add up to."""
    records = ordered("cost_curves", CURVE_KEY)
    for g in (g for g in bench.groups if g.name in curves):
        predicted = scores[g.name].sort().values.cumsum(0)
        for gone, cost in zip(curves[g.name].gone, curves[g.name].cost, strict=True):
            row = {"model": name, "calibration": images, "group": g.name, "kind": g.kind, "size": g.size, "gone": gone}
            records.add(**row, predicted=float(predicted[gone - 1]), measured=cost)


def _share(counts: Sequence[tuple[int, int]]) -> float:
    kept, of = map(sum, zip(*counts, strict=True))
    return kept / of


def ordered(name: str, key: Sequence[str]) -> Resumed:
    """Rows of a file: DeiT-Ti first, of many images, the highest target; prices in the order of COSTS."""

    def place(row: Mapping) -> tuple[float, ...]:
        way = COSTS.index(row["cost"]) if "cost" in row else 0
        return MODELS.index(row["model"]), -int(row["calibration"]), -float(row.get("target") or 0), way

    return Resumed(name, key, order=place)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("costs", nargs="*", metavar="COST", help=f"of {', '.join(COSTS)}; all by default")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    parser.add_argument("--images", type=int, default=300, help="calibration images")
    parser.add_argument("--again", action="store_true", help="measure curves that cost_curves_cpu.csv has")
    args = parser.parse_args(arguments)
    if unknown := set(args.costs).difference(COSTS):
        parser.error(f"no costs {sorted(unknown)}; there are {', '.join(COSTS)}")
    torch.set_num_threads(1)
    for name in args.models:
        measure(name, args.costs or COSTS, args.targets, args.images, args.again)
    return 0


if __name__ == "__main__":
    sys.exit(main())
