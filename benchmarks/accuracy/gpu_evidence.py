"""DeiT-Ti pruned to half its latency on Tiny-ImageNet on one GPU, beside its peers, equal training: one command.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.gpu_evidence [--seconds 540]     `make gpu-evidence` calls it
    NVIT_DATA=FOLDER python -m benchmarks.accuracy.gpu_evidence --pack TRAVEL   what another machine needs, under 60 MiB

Images are decoded once into the GPU's memory and augmented there. The dense model is trained first; then nvit prunes it
iteratively and in one shot with a refit, and uniform widths, Torch-Pruning's Taylor importance and ReViT's rule are cut
out of it at the same measured latency (bf16, graph replays); each is trained towards the dense model on as many images,
what pruning saw included, with the better of two learning rates by images held back. How many is measured at the start,
so that all fits in the seconds given; it is in every row. Wheels that the machine lacks may be put into TRAVEL before
`--pack`; on it, NVIT_DATA is that folder.

Rows go into <GPU>_evidence.csv and the figure beside it; models stay in --work, and what is there is not done again.
Without a GPU it runs on the CPU, where so many seconds are too few to say anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.accuracy.contest import KEY, OURS, PEERS, Contest, Scale, compare, needed
from benchmarks.accuracy.contest_figure import plot
from benchmarks.accuracy.library import data_folder
from benchmarks.accuracy.rows import Resumed
from benchmarks.accuracy.tiny_imagenet import deit_tiny, luggage, packed, read

CHOSEN = (OURS[1], OURS[0], *PEERS[:1], *PEERS[2:4])
SCALE = Scale(
    size=160,
    targets=(0.5,),
    decisions=25,
    batch_size=256,
    calibration=2048,
    rates=(2e-4, 6e-4),
    latency_batch=256,
    seconds=2.0,
    table_seconds=15.0,
)
HELD = 2000
"""Training images that choose learning rates."""

EPOCHS = 60
"""Of training, at most: more images than that teach little."""

APART, DECISION = 12.0, 4.0
"""Seconds of a method besides its training, and of a decision that captures its graph anew: 1 to 10 in
nvidia_h200_pruning_loop.csv."""


def rate(mine: Contest, batches: int = 20) -> float:
    """Images a second while the dense model is trained towards itself, what begins a run left out."""
    size, took = mine.scale.batch_size, []
    for steps in (batches, 3 * batches):
        start = time.monotonic()
        mine.trained(mine.host().to(mine.device), steps * size, mine.scale.rates[0], mine.dense)
        took.append(time.monotonic() - start)
    return 2 * batches * size / max(took[1] - took[0], 1e-3)


def allotted(mine: Contest, seconds: float, methods: int) -> int:
    """Images that every model is trained on, once with each learning rate, so that all take about `seconds`; what a run
    in this folder was given before stays."""
    file = mine.work / "images.txt"
    if not file.exists():
        left = seconds - methods * APART - mine.scale.decisions * DECISION
        size, most = mine.scale.batch_size, EPOCHS * len(mine.train)
        file.write_text(
            str(max(4 * size, min(most, round(rate(mine) * left / methods / len(mine.scale.rates))) // size * size))
        )
    return int(file.read_text())


def evidence(
    make: Callable[[Scale], Contest], scale: Scale, seconds: float, methods: tuple[str, ...] = CHOSEN
) -> Contest:
    """All methods in turn, within about so many seconds; one that would begin too late is left out.

    Args:
        make: the contest of a scale, its dense model trained.
    """
    end = time.monotonic() + seconds
    mine = make(scale)
    images = allotted(mine, end - time.monotonic(), len(methods))
    mine.scale = dataclasses.replace(scale, images=images, pruning_images=images // 2)
    for done, method in enumerate(methods):
        start = time.monotonic()
        if start > end and done:
            print(f"{method}: left out, the {seconds:.0f} s are over", file=sys.stderr)
            continue
        mine.run(method)
        print(f"{method}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    compare(mine.rows)
    return mine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, metavar="TRAVEL", help="write what another machine needs there, and end")
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_evidence"), help="folder of models")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the CSV and the figure")
    args = parser.parse_args()
    start, root = time.monotonic(), data_folder()
    if args.pack:
        print(f"{args.pack}: {luggage(root, args.pack) / 2**20:.1f} MiB")
        return 0
    if missing := needed(CHOSEN):
        sys.exit(missing)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {split: images.to(device) for split, images in read(packed(root, args.work)).items()}
    rows = Resumed("evidence", KEY, device, args.out)

    def make(scale: Scale) -> Contest:
        train, held = found["train"].some(len(found["train"]) - HELD), found["train"].last(HELD)
        dense = dataclasses.replace(scale, dense_images=2 * len(train))
        host = lambda: deit_tiny(root, train.classes, scale.size)  # noqa: E731
        return Contest(dense, host, train, held, found["val"], args.work, rows)

    evidence(make, SCALE, args.seconds - (time.monotonic() - start))
    figure = rows.path.with_suffix(".png")
    plot(rows.rows, figure, f"DeiT-Ti on Tiny-ImageNet, equal training, {rows.where['device']}")
    print(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
