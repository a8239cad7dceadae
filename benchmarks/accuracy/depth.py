"""Top-1 lost by DeiT-Ti when sublayers may leave whole, against widths alone, at equal MACs and at equal CPU latency.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.depth [--by macs latency] [--targets 0.65 0.5] [--images 300]

One shot, refitted, labels unread, one thread. `depth` goes by what sublayers cost alone, `less depth` by twice that;
`distance` is what the judge of `nvit prune --depth` says of each, and the lowest is taken there. All ways share what
groups were measured to cost on the same images of imagenet_sample1000 (kept in `--curves FILE`, and read from there
where it exists). `latency`: by a table of torch at batch 8, measured now or read from `--table FILE`; `measured` is the
compact model's time over the dense one's, timed in turn three times over (the median), where `--seconds` are given.
Evaluation on imagenet_val1300, cropped without resizing: `lost` in points against the dense model, of all, of
the even places and of the odd ones; `gain`: over widths alone, with its 95 % interval (paired bootstrap).
Rows are added to depth_cpu.csv; what every sublayer alone costs goes into depth_alone_cpu.csv.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.accuracy.library import INPUT, MODEL, Bench, answers, data_folder
from benchmarks.accuracy.paired import paired_bootstrap
from benchmarks.accuracy.rows import Resumed
from nvit import LatencyTable, tasks
from nvit.latency.clock import time_models
from nvit.prune.prices import ways_to_price
from nvit.refit.costs import measure_costs
from nvit.selection.curves import Curve
from nvit.selection.lagrangian import drop_to_target
from nvit.structure.masks import full_masks, widths

MODELS = (MODEL, "vit_tiny_patch16_224")
BATCH = 8
WAYS = {"measured": "widths", "less depth": "less depth", "depth": "depth"}


def curves_of(bench: Bench, scores: dict[str, Tensor], file: Path) -> dict[str, Curve]:
    """What the first units of every group cost, and all of a sublayer."""
    if file.exists():
        return {n: Curve(tuple(gone), tuple(cost)) for n, (gone, cost) in json.loads(file.read_text()).items()}
    images = [x for x, _ in bench.calibration]
    task = tasks.of("auto", bench.model)
    found = measure_costs(bench.model, bench.groups, scores, images, task=task, statistics=bench.seen, depth=True)
    file.write_text(json.dumps({n: [c.gone, c.cost] for n, c in found.items()}))
    return found


def ratio(model: nn.Module, dense: nn.Module, seconds: float) -> float:
    """Measured latency over the dense model's, median of three."""
    images = torch.randn(BATCH, *INPUT, generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(3):
        whole, ms = time_models([dense, model.eval()], images, seconds)
        found.append(ms / whole)
    return statistics.median(found)


def table_of(by: str, bench: Bench, file: str) -> LatencyTable:
    """The table that decides."""
    if by == "macs":
        return bench.table
    if not file:
        return LatencyTable.measure(bench.plain, BATCH, "cpu")
    table = LatencyTable.load(file)
    if table.setting is None or table.setting.batch_size != BATCH or table.dense != bench.table.dense:
        sys.exit(f"{file} is {table!r}; one of this model at batch {BATCH} was expected")
    return table


def measure(name: str, by: str, args: argparse.Namespace) -> None:
    """Rows of one model by one table."""
    images, file = args.images, Path(f"{args.curves}_{name}_{args.images}.json")
    bench = Bench(data_folder(), images, args.evaluate, name)
    table = table_of(by, bench, args.table)
    full, scores = full_masks(bench.groups), bench.remaining()
    curves = curves_of(bench, scores, file)
    ways, judge = ways_to_price(scores, bench.groups, full, curves), bench.judge()
    alone = Resumed("depth_alone", ("model", "group", "calibration"))
    for group, cost in ways["depth"].ends.items():
        alone.add(model=name, calibration=images, group=group, kl=cost)
    records = Resumed("depth", ("model", "by", "target", "way", "calibration"))
    for target in args.targets:
        found: dict[str, Tensor] = {}
        for priced, way in WAYS.items():
            prices = ways[priced]
            masks, _ = drop_to_target(prices.units, full, bench.groups, table, target * table.dense_ms, prices.ends)
            small = bench.pruned(masks, refit=True)
            right = found[way] = answers(small, bench.evaluation)
            blocks = widths(bench.groups, masks)
            absent = [f"{b}.{kind}" for b, w in enumerate(blocks) for kind in ("heads", "mlp") if not getattr(w, kind)]
            row = {"model": name, "by": by, "target": target, "way": way, "calibration": images, "images": len(right)}
            row |= {"predicted": table.ratio(blocks)}
            row |= {"measured": ratio(small, bench.plain, args.seconds)} if args.seconds else {}
            row |= {"macs": bench.table.ratio(blocks), "absent": " ".join(absent)}
            d = bench.dense - right
            row |= {f"lost{n}": 100 * float(d[half].mean()) for n, half in HALVES.items()}
            row |= {"distance": float(judge.of(masks))}
            if way != "widths":
                gain = paired_bootstrap(right.tolist(), found["widths"].tolist())
                row |= {"gain": 100 * gain.mean, "low": 100 * gain.low, "high": 100 * gain.high}
            records.add(**row)


HALVES = {"": slice(None), "_even": slice(0, None, 2), "_odd": slice(1, None, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by", nargs="+", choices=("macs", "latency"), default=["macs", "latency"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[MODEL])
    parser.add_argument("--targets", nargs="*", type=float, default=(0.65, 0.5), help="none: costs alone")
    parser.add_argument("--images", type=int, default=300, help="calibration images")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, three times a model; 0 for none")
    parser.add_argument("--evaluate", type=int, default=0, help="evaluation images; 0 for all")
    parser.add_argument("--table", default="", help="a latency table of torch at batch 8; measured now if empty")
    parser.add_argument(
        "--curves", default="depth_curves", help="of JSON files that keep measured costs, how they begin"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        for by in args.by:
            measure(name, by, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
