"""How far one shot by `curvature` depends on its random probes: real DeiT-Ti, all kinds together, several seeds.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.saliency_draws [--seeds 6]

Each seed sends other probes through the images of imagenet_sample1000. Top-1 and KL divergence to the dense model over
imagenet_val1300 at three analytic latencies; gain over `fisher`, which draws nothing, by paired bootstrap. Writes
benchmarks/results/saliency_draws_cpu.csv.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.accuracy.library import BATCH, REPORTED_AT, data_folder, dense_model, images_of, logits
from benchmarks.accuracy.paired import kl, paired_bootstrap
from benchmarks.harness import Records
from nvit import adapters
from nvit.calibration.gauss_newton import GateProducts
from nvit.calibration.statistics import gather_statistics
from nvit.config import PruneConfig
from nvit.criteria.curvature import curvature_loss
from nvit.latency.table import LatencyTable
from nvit.prune.pruner import Pruner
from nvit.prune.scoring import score
from nvit.selection.lagrangian import drop_to_target
from nvit.structure.compact import compact
from nvit.structure.masks import full_masks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--images", type=int, help="of each set; all if not given, otherwise nothing is written")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    root = data_folder()
    torch.set_num_threads(args.threads)
    records = Records("saliency_draws")
    dense = dense_model(root)

    def images(folder: str, class_map: Path | None) -> tuple[Tensor, Tensor]:
        pairs = images_of(root / folder, dense, class_map)[: args.images]
        return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])

    scored, labels = images("imagenet_sample1000/val", None)
    shown, truth = images("imagenet_val1300", root / "imagenet_synsets.txt")
    table, answers = LatencyTable.analytic(dense), logits(dense, shown)
    pruner = Pruner(copy.deepcopy(dense), table, PruneConfig(latency_target=0.5, train=False, criterion="fisher"))
    score(pruner, list(zip(scored.split(BATCH), labels.split(BATCH), strict=True)))
    model, full = adapters.find(dense).prepare(copy.deepcopy(dense)), full_masks(pruner.groups)
    base: dict[float, Tensor] = {}

    def reported(criterion: str, seed: int | None, scores: dict[str, Tensor]) -> None:
        for target in REPORTED_AT["all"]:
            masks, _ = drop_to_target(scores, full, pruner.groups, table, target * table.dense_ms)
            found = logits(compact(model, pruner.groups, masks), shown)
            right, away = (found.argmax(-1) == truth).float(), kl(answers, found)
            gain = paired_bootstrap(right.tolist(), base.setdefault(target, right).tolist())
            records.add(
                criterion=criterion,
                seed=seed,
                target=target,
                images=len(right),
                top1=100 * float(right.mean()),
                kl=float(away.mean()),
                over_fisher=100 * gain.mean,
                low=100 * gain.low,
                high=100 * gain.high,
            )

    reported("fisher", None, pruner.scores())
    for seed in range(args.seeds):
        gates = GateProducts()
        seen = gather_statistics(model, scored.split(BATCH), gates=gates, seed=seed)
        reported("curvature", seed, curvature_loss(model, pruner.groups, full, seen, gates))
    if args.images is None:
        records.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
