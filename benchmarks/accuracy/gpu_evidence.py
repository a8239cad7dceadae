"""DeiT-Ti pruned to half its latency on Tiny-ImageNet on one GPU, beside its peers, equal training: one command.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.gpu_evidence [--seconds 540]     `make gpu-evidence` calls it
    NVIT_DATA=FOLDER python -m benchmarks.accuracy.gpu_evidence --smoke         every method once, hardly trained
    NVIT_DATA=FOLDER python -m benchmarks.accuracy.gpu_evidence --pack TRAVEL   what another machine needs, under 60 MiB

Images are decoded once into the GPU's memory and augmented there. The dense model is trained first; then nvit prunes it
iteratively and in one shot with a refit, and uniform widths, Torch-Pruning's Taylor importance and ReViT's rule are cut
out of it at the same measured latency (bf16, graph replays, widths in multiples of 8); each is trained towards the
dense model on as many images, what pruning saw included, with the better of two learning rates by images held back.
How many is what the seconds leave once all that prunes without training has; it is in every row. Wheels that the
machine lacks may be put into TRAVEL before `--pack`; on it, NVIT_DATA is that folder.

All models, ours and peers', run torch's own ops: with --kernels fused ones where they are faster, which are tuned anew
for the widths of every decision and of every model, and that takes more of the seconds than it saves.

Rows go into <GPU>_evidence.csv and the figure beside it; models stay in --work, and what is there is not done again. A
method that fails leaves a row that says why, and the exit status is 1. Without a GPU it runs on the CPU, where so many
seconds are too few to say anything.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

import nvit
from benchmarks import harness
from benchmarks.accuracy.contest import KEY, OURS, PEERS, Contest, Scale, compare, needed, say
from benchmarks.accuracy.contest_figure import plot
from benchmarks.accuracy.library import data_folder
from benchmarks.accuracy.rows import Resumed
from benchmarks.accuracy.tiny_imagenet import deit_tiny, luggage, packed, read
from nvit.layers.functional import kernels

ITERATIVE = OURS[1]
CHOSEN = (ITERATIVE, OURS[0], *PEERS[:1], *PEERS[2:4])
SCALE = Scale(
    size=160,
    targets=(0.5,),
    images=0,
    decisions=16,
    batch_size=256,
    calibration=2048,
    rates=(2e-4, 6e-4),
    latency_batch=512,
    seconds=0.5,
    table_seconds=6.0,
)
SMOKE = dataclasses.replace(
    SCALE,
    dense_images=2560,
    images=8192,
    pruning_images=6144,
    decisions=3,
    calibration=600,
    rates=SCALE.rates[:1],
    seconds=0.2,
    table_seconds=3.0,
)
"""The same shapes, hardly trained: eight steps between decisions, of which some are captured and replayed."""

HELD = 2000
"""Training images that choose learning rates."""

EPOCHS = 60
"""Of training, at most: more images than that teach little."""

APART, DECISION = 5.0, 2.0
"""Seconds of a method besides pruning and training: graphs, answers, latency; and of a decision that captures its graph
anew. Decisions that tuned kernels took 1 to 10 in nvidia_h200_pruning_loop.csv."""

MARGIN = 0.9
"""Of the seconds left, what training may be meant to take."""


def rate(mine: Contest, model: nn.Module, batches: int = 20) -> float:
    """Images a second while a model is trained towards the dense one, what begins a run left out."""
    size, took = mine.scale.batch_size, []
    for steps in (batches, 3 * batches):
        start = time.monotonic()
        mine.trained(copy.deepcopy(model), steps * size, mine.scale.rates[0], mine.dense)
        took.append(time.monotonic() - start)
    return 2 * batches * size / max(took[1] - took[0], 1e-3)


def allotted(mine: Contest, end: float, methods: Sequence[str]) -> int:
    """Images that every model is trained on, once with each learning rate, so that all are done about when
    `time.monotonic()` is `end`; what a run in this folder was given before stays."""
    file = mine.work / "images.txt"
    if not file.exists():
        small = [path for m in methods if m != ITERATIVE for path in mine.made(m).values()]
        fast = rate(mine, nvit.load(small[0], device=str(mine.device)) if small else mine.dense)
        left = MARGIN * (end - time.monotonic()) - len(methods) * APART - mine.scale.decisions * DECISION
        size, most = mine.scale.batch_size, EPOCHS * len(mine.train)
        images = max(4 * size, min(most, round(fast * left / len(methods) / len(mine.scale.rates))) // size * size)
        say(f"{fast:.0f} images/s; every model is trained on {images} in the {left:.0f} s left")
        file.write_text(str(images))
    return int(file.read_text())


def guarded(mine: Contest, method: str, does: Callable[[str], object]) -> bool:
    """Whether it went well; where it did not, the method's rows say why, and others go on."""
    try:
        does(method)
    except Exception as why:
        traceback.print_exc()
        say(f"{method}: failed, {type(why).__name__}: {why}")
        mine.failed(method, why)
    else:
        return True
    gc.collect()
    with suppress(RuntimeError):  # a device that failed says so at every call
        torch.cuda.empty_cache()
    return False


def evidence(
    make: Callable[[Scale], Contest], scale: Scale, seconds: float, methods: Sequence[str] = CHOSEN
) -> tuple[Contest, bool]:
    """All methods in turn, within about so many seconds, unless the scale says on how many images; one that
    would begin too late is left out. Returns the contest, and whether none failed.

    Args:
        make: the contest of a scale, its dense model trained.
    """
    end = time.monotonic() + seconds
    mine = make(scale)
    say("the dense model is there")
    well = [m for m in methods if m == ITERATIVE or guarded(mine, m, mine.made)]  # it trains as it prunes: behind
    if not scale.images:
        images = allotted(mine, end, well)
        mine.scale = dataclasses.replace(scale, images=images, pruning_images=images // 2)
    failed = len(methods) - len(well)
    for done, method in enumerate(well):
        if time.monotonic() > end and done:
            say(f"{method}: left out, the {seconds:.0f} s are over")
        elif not guarded(mine, method, mine.run):
            failed += 1
    compare(mine.rows)
    return mine, not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, metavar="TRAVEL", help="write what another machine needs there, and end")
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything")
    parser.add_argument("--targets", type=float, nargs="+", default=SCALE.targets, help="of latency, largest first")
    parser.add_argument("--smoke", action="store_true", help="every line once, into smoke/ of --work and --out")
    parser.add_argument("--kernels", action="store_true", help="fused kernels where they are faster")
    parser.add_argument("--no-graphs", action="store_true", help="training steps run as they are, and slower")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_evidence"), help="folder of models")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the CSV and the figure")
    args = parser.parse_args()
    start, root = time.monotonic(), data_folder()
    if args.pack:
        print(f"{args.pack}: {luggage(root, args.pack) / 2**20:.1f} MiB")
        return 0
    if missing := needed(CHOSEN):
        sys.exit(missing)
    work, out = (folder / "smoke" if args.smoke else folder for folder in (args.work, args.out))
    decoded = read(packed(root, work))
    say("images are decoded")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {split: images.to(device) for split, images in decoded.items()}
    rows = Resumed("evidence", KEY, device, out)

    def make(scale: Scale) -> Contest:
        train, held = found["train"].some(len(found["train"]) - HELD), found["train"].last(HELD)
        if not args.smoke:
            scale = dataclasses.replace(scale, dense_images=2 * len(train))
        host = lambda: deit_tiny(root, train.classes, scale.size)  # noqa: E731
        return Contest(scale, host, train, held, found["val"], work, rows)

    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans every shape anew, and pruned ones are many
    with kernels(args.kernels):
        scale = SMOKE if args.smoke else SCALE
        scale = dataclasses.replace(scale, targets=tuple(args.targets), graphs=not args.no_graphs)
        well = evidence(make, scale, args.seconds - (time.monotonic() - start))[1]
    figure = rows.path.with_suffix(".png")
    plot(rows.rows, figure, f"DeiT-Ti on Tiny-ImageNet, equal training, {rows.where['device']}")
    say(f"{rows.path}, {figure}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
