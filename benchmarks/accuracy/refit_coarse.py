"""Widths refitted on images as they are, or on a share of them through fewer pixels: top-1 on both kinds of images.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.refit_coarse [--models NAME …]     # 4 minutes a row, one thread

Widths leave by `remaining` at one share of the multiply-accumulates a model, and what is left is refitted as
`nvit prune --refit --coarse SHARE` does, on images of imagenet_sample1000, labels unread. `lost` is in points against
the dense model on imagenet_val1300, `gain` over the same refit on images as they are, with its 95 % interval (paired
bootstrap over images). `kept` is the share of the dense top-1, in percent with its interval, on every fifth of
Tiny-ImageNet's validation images, 64 pixels made 224. Rows go into refit_coarse_cpu.csv in benchmarks/results.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.accuracy.library import MODEL, Bench, answers, data_folder
from benchmarks.accuracy.paired import answered, bits, paired_bootstrap, ratio_bootstrap
from benchmarks.accuracy.rows import Resumed
from benchmarks.accuracy.upscaled import Tiny
from nvit.calibration.coarse import coarser
from nvit.selection.lagrangian import drop_to_target
from nvit.structure.masks import full_masks

TARGETS = {MODEL: 0.65, "vit_tiny_patch16_224": 0.8}
SHARES = (0.0, 0.5)


def measure(name: str, images: int, rows: Resumed) -> None:
    """Rows of one model that the file has not yet."""
    bench, tiny, target = Bench(data_folder(), images, 0, name), Tiny(data_folder()), TARGETS[name]
    masks, _ = drop_to_target(
        bench.remaining(), full_masks(bench.groups), bench.groups, bench.table, target * bench.table.dense_ms
    )
    dense = tiny.right(bench.plain)
    for share in SHARES:
        if rows.find(model=name, coarse=share) is not None:
            continue
        batches = list(zip(coarser((x for x, _ in bench.calibration), share), bench.calibration, strict=True))
        small = bench.pruned(masks, refit=True, batches=batches)
        right, there = answers(small.eval(), bench.evaluation), tiny.right(small)
        row = {"model": name, "coarse": share, "target": target, "calibration": images, "images": len(right)}
        row |= {"top1": 100 * float(right.mean()), "lost": 100 * float((bench.dense - right).mean())}
        sharp = rows.find(model=name, coarse=0.0)
        if share and sharp is not None:
            d = paired_bootstrap(right.tolist(), answered(sharp["right"], len(right)))
            row |= {"gain": 100 * d.mean, "gain_low": 100 * d.low, "gain_high": 100 * d.high}
        shares = ratio_bootstrap(there.tolist(), dense.tolist())
        row |= {key: 100 * s for key, s in zip(("kept", "kept_low", "kept_high"), shares, strict=True)}
        rows.add(**row, tiny_dense=100 * float(dense.mean()), tiny_images=len(there), right=bits(right))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--images", type=int, default=300, help="calibration images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = Resumed("refit_coarse", ("model", "coarse"))
    for name in args.models:
        measure(name, args.images, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
