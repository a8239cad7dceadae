"""Towers without a head: DeiT-Ti pruned by its class token's features against pruning it as a classifier.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.features [--target 0.65] [--images 1000] [--cases features/whole …]

Both in one shot with a refit, from the same 1000 images of imagenet_sample1000 without their labels, to the same share
of multiply-accumulates; the classifier loses its head afterwards. `epochs`: so many of the same images then trained the
pruned tower towards the dense one's features. Then, for each: the cosine of its features to the
dense ones, the top-1 of k-NN (k = 20) with the 1000 images as the bank (one a class) and the 1300 validation images
asked, with its difference from the dense tower's (`knn_points`) and the standard error of that, paired over images, and
of a linear probe trained on the same bank. `stream` says whether channels of the residual stream may leave: `whole`
(no), `restored` (they may, `--keep-output` brings the width back), `narrow` (they may, the features are narrower).
The restoring layer's own multiply-accumulates are in `macs`, not in the target. A row is written to
benchmarks/results/features_cpu.csv as soon as it is known; rows of cases that are not asked for stay.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import nvit
from benchmarks.accuracy.library import BATCH, data_folder, dense_model, images_of, without_head
from benchmarks.accuracy.rows import Resumed, Rows
from nvit.analysis.evaluate import macs
from nvit.analysis.neighbours import Bank, cosine, features_of, knn, linear_probe, percent

EPOCHS = (3, 10)
CASES = ("features/whole", "classification/whole", "features/restored", "classification/narrow")


def pruned(model: nn.Module, loader, config: nvit.PruneConfig) -> nn.Module:
    """The compact model at the config's target of multiply-accumulates; `model` is left as it is."""
    model = copy.deepcopy(model)
    return nvit.prune(model, loader, config, nvit.LatencyTable.analytic(model, config.bundle_sizes)).model


def taught(small: nn.Module, dense: nn.Module, loader, batch_size: int, epochs: int) -> nn.Module:
    """A copy of a pruned tower after some epochs towards the dense one's features."""
    config = nvit.FinetuneConfig(
        task="features", epochs=epochs, batch_size=batch_size, lr=5e-4, min_lr=1e-6, grad_clip=1.0, amp="bf16"
    )
    return nvit.finetune(copy.deepcopy(small), loader, config, teacher=dense).eval()


def difference(right: Tensor, dense: Tensor) -> tuple[float, float]:
    """Points of top-1 above the dense tower's, and their standard error, paired over images: of right or wrong answers
    `(images,)` to the same images."""
    points = 100 * (right.double() - dense.double())
    return float(points.mean()), float(points.std() / len(points) ** 0.5)


def compare(
    dense: nn.Module,
    bank: Dataset,
    asked: Dataset,
    base: nvit.PruneConfig,
    records: Rows,
    cases: Sequence[str] = CASES,
    epochs: Sequence[int] = EPOCHS,
) -> None:
    """A row for the dense tower, then one for each way to prune it; saved after each.

    Args:
        dense: a timm classifier with trained weights; its copies are pruned.
        bank, asked: images with class numbers; those of `bank` calibrate too, without them.
        base: the target, and how many images calibrate.
        cases: of `CASES`.
        epochs: of training, of the tower that was pruned by its features, each from where pruning left it.
    """
    bank_loader, asked_loader = (DataLoader(images, batch_size=base.batch_size) for images in (bank, asked))
    calibration = nvit.data.TrainingData(bank, base.batch_size)
    tower = without_head(dense)
    known = features_of(tower, bank_loader), features_of(tower, asked_loader)
    dense_right = knn(*known)

    def add(case: str, stream: str, model: nn.Module, seconds: float = 0.0, epochs: int = 0) -> None:
        mine: tuple[Bank, Bank] = features_of(model, bank_loader), features_of(model, asked_loader)
        same = mine[1].features.shape == known[1].features.shape
        right = knn(*mine)
        points, off = difference(right, dense_right)
        records.add(
            case=case,
            stream=stream,
            epochs=epochs,
            macs=macs(model, nvit.adapters.preprocess(model)["input_size"]),
            width=mine[1].features.shape[1],
            cosine=cosine(mine[1], known[1]) if same else None,
            knn=percent(right)[0],
            knn_points=points,
            knn_points_se=off,
            probe=percent(linear_probe(*mine))[0],
            cpu_s=seconds,
        )

    def run(case: str, model: nn.Module, **how) -> tuple[nn.Module, float]:
        start = time.process_time()
        small = pruned(model, calibration, dataclasses.replace(base, task=case, **how))
        return small, time.process_time() - start

    add("dense", "whole", tower)
    for case in cases:
        task, stream = case.split("/")
        how = {"whole": {"freeze": ("emb",)}, "restored": {"keep_output": True}, "narrow": {}}[stream]
        small, seconds = run(task, tower if task == "features" else dense, **how)
        add(task, stream, small if task == "features" else without_head(small), seconds)
        for count in epochs if case == "features/whole" else ():
            start = time.process_time()
            trained = taught(small, tower, calibration, base.batch_size, count)
            add(task, stream, trained, time.process_time() - start, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.65)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--epochs", nargs="*", type=int, default=EPOCHS, help="of training towards the dense tower")
    given = parser.parse_args()
    root = data_folder()
    dense, classes = dense_model(root), root / "imagenet_synsets.txt"
    bank, asked = (images_of(root / name, dense, classes) for name in ("imagenet_sample1000", "imagenet_val1300"))
    base = nvit.PruneConfig(latency_target=given.target, train=False, refit=True, images=given.images, batch_size=BATCH)
    records = Resumed("features", ("case", "stream", "epochs"))
    compare(dense, bank, asked, base, records, given.cases, given.epochs)


if __name__ == "__main__":
    main()
