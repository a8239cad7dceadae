"""What a refit of DeiT-B costs, from one block: CPU seconds of two blocks less those of one, times twelve.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.refit_block [--images 100]

Random weights, real images: the work does not depend on the weights. Half of every MLP leaves. Watching, scoring and
refitting are timed apart; what does not grow with depth (embedding, classifier) is the rest of the one-block model's
time. Writes benchmarks/results/refit_block_cpu.csv.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time

import timm
import torch

from benchmarks.accuracy.library import data_folder
from benchmarks.harness import Records
from nvit import adapters
from nvit.calibration.statistics import gather_statistics
from nvit.cli.flags import DataFlags
from nvit.cli.inputs import open_images
from nvit.config import PruneConfig
from nvit.criteria.remaining import remaining_loss
from nvit.refit.refit import refit_
from nvit.refit.rotation import rotate_
from nvit.structure.masks import apply_, full_masks
from nvit.utils.memory import Meter

DEPTH, BATCH = 12, 25
STEPS = ("watch_s", "score_s", "refit_s")


def seconds(depth: int, images: list[torch.Tensor]) -> dict[str, float]:
    """CPU seconds of each step on DeiT-B with `depth` blocks, and MiB over what was held before."""
    torch.manual_seed(0)
    model = timm.create_model("deit_base_patch16_224", depth=depth).eval()
    adapter = adapters.find(model)
    groups, meter = adapter.groups(adapter.prepare(model)), Meter("cpu")
    held, marks = meter.held, [time.process_time()]
    seen = gather_statistics(model, images)
    rotate_(model, seen)
    marks.append(time.process_time())
    scores = remaining_loss(model, groups, full_masks(groups), seen)
    marks.append(time.process_time())
    dense, masks = copy.deepcopy(model), full_masks(groups)
    for g in groups:
        if g.kind == "mlp":
            masks[g.name][scores[g.name].argsort()[: g.size // 2]] = False
    apply_(model, groups, masks)
    refit_(model, dense, groups, images, statistics=seen)
    marks.append(time.process_time())
    found = dict(zip(STEPS, (b - a for a, b in itertools.pairwise(marks)), strict=True))
    return found | {"peak_mib": (meter.peak - held) / 2**20}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, help="calibration images")
    args = parser.parse_args()
    data = data_folder()
    torch.set_num_threads(1)
    model = adapters.find(m := timm.create_model("deit_base_patch16_224", depth=1)).prepare(m)
    where = DataFlags(data=f"{data}/imagenet_sample1000/val", class_map=f"{data}/imagenet_synsets.txt", resize=False)
    loader = open_images(model, where).training(PruneConfig(batch_size=BATCH), augment=False)
    images = [x for (x, _), _ in zip(loader, range(-(-args.images // BATCH)), strict=False)]
    count, records = sum(len(x) for x in images), Records("refit_block")
    one, two = seconds(1, images), seconds(2, images)
    for depth, found in ((1, one), (2, two)):
        records.add(case=f"{depth} blocks", images=count, **found)
    whole = {k: one[k] + (DEPTH - 1) * (two[k] - one[k]) for k in (*STEPS, "peak_mib")}
    records.add(case=f"{DEPTH} blocks, estimated", images=count, **whole)
    records.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
