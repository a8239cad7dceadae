"""The paper's ablations (appendix B) on Tiny-ImageNet's images with DeiT-Ti's weights, equal steps for every row.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.ablations [--scale full] [--tables alignment objective …]

DeiT-Ti at the scale's image size, its head's rows of the 200 classes, is trained once, its latency measured, and every
arm prunes it to a share of that latency and trains for what is left of the steps. What is needed again is in --out.
Rows are in benchmarks/results/ablations_cpu.csv as soon as they are known, with their answers by image (`right`, a bit
an image); those that the file has are left as they are, and `--minutes` ends a run between two rows.

No CNN teacher's weights are here: hard labels of ViT-Ti at 224 pixels stand in. Without head alignment, dims leave the
concatenated heads, and the model that is left is padded to the widest head of each block. The correlation of saliency
with the loss (B.5) is in correlation_cpu.csv.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import nvit
from benchmarks.accuracy.ablation_arms import ARMS, OURS, Arm, difference
from benchmarks.accuracy.ablation_data import TEACHER, HardLabels, Pixels, config_of, imagenet_model, imagenet_rows
from benchmarks.accuracy.ablation_runs import SCALES, Bench, Scale, answers, run
from benchmarks.accuracy.library import MODEL, data_folder
from benchmarks.accuracy.paired import bits
from benchmarks.accuracy.rows import Resumed
from nvit import adapters
from nvit.training.data import TrainingData
from nvit.training.distill import renormalisation

TEACHER_SIZE = 224


def opened(root: Path, scale: Scale, out: Path) -> Bench:
    """Images, the trained dense model, its latency table, and the network of hard labels."""
    tiny, config = root / "tiny_imagenet200", config_of(scale.size)
    train = Pixels(tiny / "train", scale.each, config)
    evaluation = Pixels(tiny / "val", scale.evaluate_each, config)
    classes = imagenet_rows(root, train.names)
    dense = dense_model(root, scale, out, classes).to(scale.device)
    file = out / f"table_{scale.size}.json"
    if not file.exists():
        where = {"batch_size": scale.latency_batch, "device": scale.device, "seconds": scale.table_seconds}
        nvit.LatencyTable.measure(dense, **where).save(file)
    hard = HardLabels(
        imagenet_model(root, TEACHER, TEACHER_SIZE, classes).to(scale.device),
        TEACHER_SIZE,
        out / f"hard_{scale.size}.safetensors",
    )
    theirs = renormalisation(config, config_of(scale.size, TEACHER), scale.device)
    return Bench(scale, dense, train, evaluation, nvit.LatencyTable.load(file), hard, theirs)


def dense_model(root: Path, scale: Scale, out: Path, classes: Sequence[int]) -> torch.nn.Module:
    """DeiT-Ti that answers for these classes, trained at the image size, prepared, in evaluation mode."""
    model = imagenet_model(root, MODEL, scale.size, classes)
    adapters.find(model).prepare(model)
    file = out / f"dense_{scale.size}.safetensors"
    if not file.exists():
        images = Pixels(root / "tiny_imagenet200" / "train", scale.dense_each, config_of(scale.size))
        loader = TrainingData(images, scale.batch, 0, scale.workers)
        shared = {"batch_size": scale.batch, "amp": scale.amp, "distill_weight": 0.0}
        config = nvit.FinetuneConfig(epochs=scale.dense_epochs, lr=scale.lr, min_lr=1e-6, **shared)
        nvit.finetune(model.to(scale.device).train(), loader, config)
        save_file({n: p.contiguous().cpu() for n, p in model.state_dict().items()}, file)
    model.load_state_dict(load_file(file))
    return model.eval()


def fill(
    bench: Bench, arms: Sequence[Arm], seeds: Sequence[int], minutes: float, folder: Path | None = None
) -> Resumed:
    """Measure the rows that the file does not have, one seed after the other, until the time is up."""
    records, end = Resumed("ablations", ("arm", "seed"), bench.scale.device, folder), time.monotonic() + 60 * minutes
    if records.find(arm="dense", seed="") is None:
        records.add(**dense_row(bench))
    for seed in seeds:
        for arm in arms:
            missing = [name for name in arm.rows if records.find(arm=name, seed=seed) is None]
            if time.monotonic() < end and missing:
                for row in run(bench, arm, seed):
                    records.add(**row)
                if isinstance(bench.hard, HardLabels):
                    bench.hard.keep()
    return records


def dense_row(bench: Bench) -> dict:
    right = answers(bench.dense, bench)
    return {
        "table": "",
        "arm": "dense",
        "seed": "",
        "top1": 100 * float(right.mean()),
        "images": len(right),
        "right": bits(right),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = list(dict.fromkeys(arm.table for arm in ARMS if arm.table))
    parser.add_argument("--scale", choices=list(SCALES), default="small")
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--minutes", type=float, default=360.0, help="no row begins later")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of what is made once")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    bench = opened(data_folder(), SCALES[given.scale], given.out)
    arms = [arm for arm in ARMS if arm.name == OURS or arm.table in given.tables]
    rows = fill(bench, arms, given.seeds, given.minutes).rows
    for name in (name for arm in arms for name in arm.rows):
        if (d := difference(rows, name)) is not None:
            print(f"{name}: {100 * d.mean:+.1f} points ({100 * d.low:+.1f} to {100 * d.high:+.1f}) over {OURS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
