"""Share of the dense model's top-1 that models with merged tokens and pruned widths keep on images of another kind.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.elsewhere --work FOLDER [--targets 0.5]

Models of `benchmarks.accuracy.tokens` in --work, calibrated and chosen on imagenet_sample1000, answer Tiny-ImageNet's
validation images, which nothing was tuned on: 64 pixels made 224, every fifth of the 10,000, the best of its 200
classes counts. `kept` is in percent of the dense model's top-1 there, with its 95 % interval (paired bootstrap over
images). Rows go into elsewhere_cpu.csv in benchmarks/results; answers stay in --work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

import nvit
from benchmarks.accuracy.library import BATCH, data_folder
from benchmarks.accuracy.rows import Resumed
from benchmarks.accuracy.token_bench import MODELS, TokenBench
from nvit.analysis.evaluate import macs

EVERY = 5
DRAWS = 10_000


class Tiny:
    """Tiny-ImageNet's validation images, and which outputs of an ImageNet classifier stand for its classes."""

    def __init__(self, data: Path) -> None:
        self.files = ImageFolder(str(data / "tiny_imagenet200" / "val"))
        synsets = (data / "imagenet_synsets.txt").read_text().split()
        self.outputs = torch.tensor([synsets.index(name) for name in self.files.classes])

    def batches(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        transform = nvit.data.transform(resolve_data_config(model=model))
        chosen = range(0, len(self.files), EVERY)
        for start in range(0, len(chosen), BATCH):
            pairs = [self.files[i] for i in chosen[start : start + BATCH]]
            yield torch.stack([transform(image) for image, _ in pairs]), torch.tensor([label for _, label in pairs])

    @torch.inference_mode()
    def right(self, model: nn.Module) -> Tensor:
        """Right or wrong by image, float `(images,)`."""
        model.eval()
        return torch.cat([(model(x)[:, self.outputs].argmax(-1) == y).float() for x, y in self.batches(model)])


def kept(right: Tensor, dense: Tensor) -> tuple[float, float, float]:
    """Percent of the dense top-1, and its 95 % interval over images drawn anew."""
    a, b = right.numpy(), dense.numpy()
    drawn = np.random.default_rng(0).integers(0, len(a), (DRAWS, len(a)))
    low, high = np.quantile(100 * a[drawn].mean(1) / b[drawn].mean(1), (0.025, 0.975))
    return float(100 * a.mean() / b.mean()), float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of benchmarks.accuracy.tokens")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--of", default="macs", choices=("macs", "latency"))
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5])
    parser.add_argument("--methods", nargs="+", default=["joint", "ToMe"])
    parser.add_argument("--images", type=int, default=1000, help="calibration images")
    args = parser.parse_args()
    records, tiny = Resumed("elsewhere", ("model", "of", "target", "method")), Tiny(data_folder())
    for name in args.models:
        bench = TokenBench(name, args.of, args.images, args.work)
        whole = macs(bench.plain, nvit.adapters.preprocess(bench.plain)["input_size"])
        dense = bench.kept("tiny-dense", lambda bench=bench: tiny.right(bench.plain))
        for target in args.targets:
            for method in args.methods:
                if not (path := bench.folder(method, target)).exists():
                    sys.exit(
                        f"{path} does not exist; run benchmarks.accuracy.tokens {args.of} --work {args.work} first"
                    )
                model = nvit.load(path)
                right = bench.kept(f"tiny-{method}-{target:g}", lambda model=model: tiny.right(model))
                share, low, high = kept(right, dense)
                row = {"model": name, "of": args.of, "target": target, "method": method}
                row |= {"macs": macs(model, nvit.adapters.preprocess(model)["input_size"]) / whole}
                row |= {"top1": 100 * float(right.mean()), "dense": 100 * float(dense.mean())}
                records.add(**row, kept=share, low=low, high=high, images=len(right), calibration=args.images)
    return 0


if __name__ == "__main__":
    sys.exit(main())
