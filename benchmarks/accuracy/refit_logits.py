"""Queries and keys of DeiT-Ti narrowed in one shot: rotated first, refitted so that logits stay, or both; no training.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.refit_logits [--images 300] [--eval-images 650]

The same share of query/key dims leaves every block. `basis`: the trained one, or each head's own (`nvit.rotation`).
`refit`: none; `logits`, queries and keys in so many turns (`benchmarks.accuracy.logit_refit`); `layers`, every linear
layer of the model (`nvit.refit`). KL divergence to the dense model and top-1. Writes
benchmarks/results/refit_logits_cpu.csv.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import torch
from torch import Tensor, nn

from benchmarks.accuracy.library import Bench, data_folder, in_every_group
from benchmarks.accuracy.logit_refit import refit_logits_
from benchmarks.accuracy.paired import kl
from benchmarks.harness import Records
from nvit.calibration.statistics import gather_statistics
from nvit.criteria.remaining import remaining_loss
from nvit.refit.refit import refit_
from nvit.structure.compact import compact
from nvit.structure.masks import apply_, full_masks

SHARES = (0.3, 0.5, 0.75)
REFITS = {"none": 0, "logits, 1 turn": 1, "logits, 3 turns": 3, "logits, 10 turns": 10, "layers": 0}


@torch.inference_mode()
def _logits(model: nn.Module, batches) -> Tensor:
    return torch.cat([model(x) for x, _ in batches])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300, help="calibration images")
    parser.add_argument("--eval-images", type=int, default=650, help="evaluation images; 0 for all")
    args = parser.parse_args()
    root = data_folder()
    torch.set_num_threads(1)
    bench = Bench(root, args.images, args.eval_images)
    records = Records("refit_logits")
    images, labels = [x for x, _ in bench.calibration], torch.cat([y for _, y in bench.evaluation])
    exact = _logits(bench.plain, bench.evaluation)
    bases = {"trained": (bench.plain, gather_statistics(bench.plain, images)), "rotated": (bench.model, bench.seen)}

    def measure(model: nn.Module, **row) -> None:
        found = _logits(model, bench.evaluation)
        top1 = 100 * float((found.argmax(-1) == labels).float().mean())
        records.add(**row, kl=float(kl(exact, found).mean()), top1=top1, images=args.images)

    measure(bench.plain, removed=0.0, basis="trained", refit="none")
    for share in SHARES:
        for basis, (dense, seen) in bases.items():
            scores = remaining_loss(dense, bench.groups, full_masks(bench.groups), seen)
            masks = in_every_group(bench.groups, scores, "qk_dim", share)
            for refit, turns in REFITS.items():
                model, start = copy.deepcopy(dense), time.process_time()
                apply_(model, bench.groups, masks)
                if turns:
                    refit_logits_(model, dense, bench.groups, images, seen, turns)
                elif refit == "layers":
                    refit_(model, dense, bench.groups, images, statistics=seen)
                seconds = time.process_time() - start
                measure(
                    compact(model, bench.groups, masks), removed=share, basis=basis, refit=refit, refit_cpu_s=seconds
                )
    records.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
