"""Accuracy of DeiT-Ti against measured latency on Tiny-ImageNet: nvit's ways to prune beside others, equal training.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.curve --work FOLDER [METHOD …]     [--plot: the figure alone]

Images of 112 pixels, 49 tokens, so that two cores can train; one CPU thread, eight images a batch for latency. DeiT-Ti
with the head's rows of the 200 classes is trained on 3200 images first; that model is pruned to 0.65 and 0.5 of its
measured latency, and each narrow one is trained on 1600 towards it, by the same loss and schedule, with the better of
two learning rates by 1000 training images held back. 2000 validation images evaluate; `untrained` is the accuracy
before training, of a fifth of them. `ahead`: points over the best peer at that target, with the 95 % interval (paired
bootstrap over images). About 25 minutes of one core; what --work has is not done again.

Rows go into curve_cpu.csv with their answers by image, and the figure beside it into curve_cpu.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.accuracy.contest import KEY, METHODS, Contest, Scale, compare, needed
from benchmarks.accuracy.contest_figure import plot
from benchmarks.accuracy.library import data_folder
from benchmarks.accuracy.rows import Resumed
from benchmarks.accuracy.tiny_imagenet import Images, deit_tiny, packed, read

TRAINED, HELD, EVALUATED = 8000, 1000, 2000


def contest(work: Path, scale: Scale, found: Mapping[str, Images], rows: Resumed) -> Contest:
    """From DeiT-Ti's own weights."""
    train, held, val = found["train"].some(TRAINED), found["train"].last(HELD), found["val"].some(EVALUATED)
    return Contest(scale, lambda: deit_tiny(data_folder(), train.classes, scale.size), train, held, val, work, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(map(repr, METHODS))}; all")
    parser.add_argument("--work", type=Path, default=Path("runs/curve"), help="folder of models and the latency table")
    parser.add_argument("--targets", type=float, nargs="+", default=Scale.targets, help="of latency, shares of dense")
    parser.add_argument("--plot", action="store_true", help="draw the figure from the CSV that is there")
    args = parser.parse_args()
    if unknown := set(args.methods).difference(METHODS):
        parser.error(f"no methods {sorted(unknown)}; there are {', '.join(METHODS)}")
    rows, scale = Resumed("curve", KEY), Scale(targets=tuple(args.targets))
    if not args.plot:
        if missing := needed(args.methods or METHODS):
            sys.exit(missing)
        torch.set_num_threads(1)
        args.work.mkdir(parents=True, exist_ok=True)
        mine = contest(args.work, scale, read(packed(data_folder(), args.work)), rows)
        for method in args.methods or METHODS:
            mine.run(method)
            compare(rows)
    path = harness.RESULTS / "curve_cpu.png"
    plot(rows.rows, path, "DeiT-Ti on Tiny-ImageNet, equal training, one CPU thread")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
