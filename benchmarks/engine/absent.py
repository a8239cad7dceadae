"""Latency of DeiT-Ti without some of its sublayers: predicted by a table, and taken; one CPU thread, batch 8.

    python -m benchmarks.engine.absent [--table FILE] [--rounds 15]

The table knows no piece of width 0: it counts nothing for what has left. Models are run in turn, the dense one too;
`taken` is the median over rounds of CPU seconds over the dense model's (on a machine with other work, wall-clock time
would be theirs as well). `off` is how far the prediction is from it, in percent. Writes absent_cpu.csv.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import timm
import torch
from torch import Tensor, nn

from benchmarks import harness
from nvit import LatencyTable, adapters
from nvit.structure.compact import compact
from nvit.structure.masks import full_masks, widths

MODEL, BATCH = "deit_tiny_patch16_224", 8
CASES = {
    "no attention in 4 blocks": {"heads": (2, 5, 8, 11)},
    "no MLP in 4 blocks": {"mlp": (2, 5, 8, 11)},
    "3 of each": {"heads": (1, 4, 7), "mlp": (2, 5, 8)},
    "6 of each": {"heads": (0, 2, 4, 6, 8, 10), "mlp": (1, 3, 5, 7, 9, 11)},
    "blocks 6 to 11": {"heads": tuple(range(6, 12)), "mlp": tuple(range(6, 12))},
}
"""What leaves, by the block it is in."""


@torch.inference_mode()
def seconds(model: nn.Module, images: Tensor) -> float:
    """CPU seconds of a batch."""
    start = time.process_time()
    model(images)
    return time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default="", help="of torch at batch 8; measured now if empty")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dense = timm.create_model(MODEL).eval()
    adapter = adapters.find(dense)
    groups = adapter.groups(adapter.prepare(dense))
    table = LatencyTable.load(args.table) if args.table else LatencyTable.measure(dense, BATCH, "cpu")
    models, predicted = {"dense": dense}, {}
    for case, gone in CASES.items():
        masks = full_masks(groups)
        for g in groups:
            if g.ends is not None and g.blocks[0] in gone.get(g.kind, ()):
                for name in (g.name, *g.ends):
                    masks[name][:] = False
        models[case] = compact(dense, groups, masks).eval()
        predicted[case] = table.ratio(widths(groups, masks))
    images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for model in models.values():
        seconds(model, images)
    rounds = [{case: seconds(model, images) for case, model in models.items()} for _ in range(args.rounds)]
    records = harness.Records("absent")
    for case, ratio in predicted.items():
        taken = [r[case] / r["dense"] for r in rounds]
        median = statistics.median(taken)
        spread = statistics.quantiles(taken, n=4)
        row = {"model": MODEL, "batch": BATCH, "case": case, "predicted": ratio, "taken": median}
        records.add(**row, low=spread[0], high=spread[2], off=100 * (ratio / median - 1))
    records.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
