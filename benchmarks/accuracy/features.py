"""Towers without a head: DeiT-Ti pruned by its class token's features against pruning it as a classifier.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.features [--target 0.65] [--images 1000]

Both in one shot with a refit, from the same 1000 images of imagenet_sample1000 without their labels, to the same share
of multiply-accumulates; the classifier loses its head afterwards. `epochs`: so many of the same images then trained the
pruned tower towards the dense one's features. Then, for each: the cosine of its features to the
dense ones, the top-1 of k-NN (k = 20) with the 1000 images as the bank (one a class) and the 1300 validation images
asked, with its difference from the dense tower's (`knn_points`) and the standard error of that, paired over images, and
of a linear probe trained on the same bank. `stream` says whether channels of the residual stream may leave: `whole`
(no), `restored` (they may, `--keep-output` brings the width back), `narrow` (they may, the features are narrower).
The restoring layer's own multiply-accumulates are in `macs`, not in the target. A row is written to
benchmarks/results/features_cpu.csv as soon as it is known.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import nvit
from benchmarks.accuracy.library import BATCH, data_folder, dense_model, images_of, without_head
from benchmarks.accuracy.rows import Rows
from nvit.analysis.evaluate import macs
from nvit.analysis.neighbours import Bank, cosine, features_of, knn, linear_probe, percent

EPOCHS = 3


def pruned(model: nn.Module, loader, config: nvit.PruneConfig) -> nn.Module:
    """The compact model at the config's target of multiply-accumulates; `model` is left as it is."""
    model = copy.deepcopy(model)
    return nvit.prune(model, loader, config, nvit.LatencyTable.analytic(model, config.bundle_sizes)).model


def taught(small: nn.Module, dense: nn.Module, loader, batch_size: int) -> nn.Module:
    """A copy of a pruned tower after `EPOCHS` towards the dense one's features."""
    config = nvit.FinetuneConfig(
        task="features", epochs=EPOCHS, batch_size=batch_size, lr=5e-4, min_lr=1e-6, grad_clip=1.0, amp="bf16"
    )
    return nvit.finetune(copy.deepcopy(small), loader, config, teacher=dense).eval()


def difference(right: Tensor, dense: Tensor) -> tuple[float, float]:
    """Points of top-1 above the dense tower's, and their standard error, paired over images: of right or wrong answers
    `(images,)` to the same images."""
    points = 100 * (right.double() - dense.double())
    return float(points.mean()), float(points.std() / len(points) ** 0.5)


def compare(dense: nn.Module, bank: Dataset, asked: Dataset, base: nvit.PruneConfig, records: Rows) -> None:
    """A row for the dense tower, then one for each way to prune it; saved after each.

    Args:
        dense: a timm classifier with trained weights; its copies are pruned.
        bank, asked: images with class numbers; those of `bank` calibrate too, without them.
        base: the target, and how many images calibrate.
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
    small, seconds = run("features", tower, freeze=("emb",))
    add("features", "whole", small, seconds)
    start = time.process_time()
    add("features", "whole", taught(small, tower, calibration, base.batch_size), time.process_time() - start, EPOCHS)
    small, seconds = run("classification", dense, freeze=("emb",))
    add("classification", "whole", without_head(small), seconds)
    small, seconds = run("features", tower, keep_output=True)
    add("features", "restored", small, seconds)
    small, seconds = run("classification", dense)
    add("classification", "narrow", without_head(small), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.65)
    parser.add_argument("--images", type=int, default=1000)
    given = parser.parse_args()
    root = data_folder()
    dense, classes = dense_model(root), root / "imagenet_synsets.txt"
    bank, asked = (images_of(root / name, dense, classes) for name in ("imagenet_sample1000", "imagenet_val1300"))
    base = nvit.PruneConfig(latency_target=given.target, train=False, refit=True, images=given.images, batch_size=BATCH)
    compare(dense, bank, asked, base, Rows("features"))


if __name__ == "__main__":
    main()
