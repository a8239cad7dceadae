"""The whole pruning loop with distillation on a GPU, images/s, beside a plain loop that trains timm's dense model so.

    python -m benchmarks.engine.pruning_loop [--batch-size 128]

`nvit.prune` on DeiT-B (distilled) with its unpruned self as teacher: augmented batches aside, all that a run does, a
decision every `--interval` steps with so many bundles that a few of them reach `--target`. Each row is the time between
two decisions, the decision and what follows from it (a new graph, new shapes) included; `settled` is its middle half,
without either. The peer is timm's two models in plain PyTorch: same losses, optimiser and autocast, eager. Batches lie
on the device for both. Writes <GPU>_pruning_loop.csv.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor

import nvit
from benchmarks.engine.library import Setting, first_line
from benchmarks.harness import Records
from benchmarks.timing import back_to_back

WEIGHT, TAU = 50.0, 3.0
Batch = tuple[Tensor, Tensor]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class MarkedLoader:
    """The same few batches over and over; `marks` holds the time at every so many of them, the device waited for."""

    def __init__(self, batches: Sequence[Batch], every: int, device: torch.device) -> None:
        self.batches, self.every, self.device = batches, every, device
        self.marks: list[float] = []

    def __len__(self) -> int:
        return 10**6

    def __iter__(self) -> Iterator[Batch]:
        for i in range(len(self)):
            if i % self.every == 0:
                synchronise(self.device)
                self.marks.append(time.perf_counter())
            yield self.batches[i % len(self.batches)]


def plain_step(setting: Setting, batches: Sequence[Batch]) -> Callable[[], object]:
    """A step of timm's distilled DeiT taught by a frozen copy of itself: Eq. 8 and 9 of arXiv:2110.04869 in PyTorch."""
    student = setting.create()
    teacher = copy.deepcopy(student).requires_grad_(False)
    for model in (student, teacher):
        model.set_distilled_training(True)
    student.train()
    teacher.train()  # so that both give both tokens' logits; DeiT-B has neither dropout nor drop path
    optimizer = create_optimizer_v2(student, opt="adamw", lr=1e-5, weight_decay=0.05)
    turn = iter(range(10**9))

    def divergence(mine: Tensor, its: Tensor) -> Tensor:
        p, q = F.log_softmax(its / TAU, -1), F.log_softmax(mine / TAU, -1)
        return F.kl_div(q, p, reduction="batchmean", log_target=True)

    def step() -> None:
        images, labels = batches[next(turn) % len(batches)]
        optimizer.zero_grad()
        with setting.autocast():
            with torch.no_grad():
                targets = teacher(images)
            ours = student(images)
            loss = F.cross_entropy(sum(ours) / 2, labels)
            loss = loss + WEIGHT * sum(divergence(s, t) for s, t in zip(ours, targets, strict=True))
        loss.backward()
        optimizer.step()

    return step


def segments(marks: Sequence[float], decisions: Sequence[tuple[int, float]], interval: int) -> list[dict[str, float]]:
    """Rows between decisions: ratio of dense latency, seconds a step over the whole interval, the decision at its end
    included, and over its second and third quarter, where a captured step is replayed and nothing is decided.

    Args:
        marks: times at every quarter of an interval.
        decisions: `(step, ratio after it)`.
    """
    found, half = [], interval // 2
    for k in range((len(marks) - 1) // 4):
        start, first, _, third, end = marks[4 * k : 4 * k + 5]
        ratio = next((r for step, r in reversed(decisions) if step <= k * interval), 1.0)
        found.append({"ratio": ratio, "step_s": (end - start) / interval, "settled_s": (third - first) / half})
    return found


def prune(setting: Setting, loader: MarkedLoader, target: float, bundles: int, interval: int) -> list[dict[str, float]]:
    """One run of `nvit.prune`, as `segments`."""
    model = setting.create()
    config = nvit.PruneConfig(
        batch_size=setting.batch_size,
        amp="no" if setting.amp is None else "bf16",
        latency_target=target,
        interval=interval,
        bundles_per_step=bundles,
        distill_weight=WEIGHT,
        distill_tau=TAU,
        lr=1e-5,
    )
    history = nvit.prune(model, loader, config, nvit.LatencyTable.analytic(model)).history
    synchronise(setting.device)
    loader.marks.append(time.perf_counter())
    return segments(loader.marks, [(h["step"], h["predicted_ratio"]) for h in history], interval)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--interval", type=int, default=20, help="steps between two decisions, a multiple of 4")
    parser.add_argument("--bundles", type=int, default=400, help="that leave at a decision; DeiT-B has 2,616")
    parser.add_argument("--target", type=float, default=0.35, help="of dense latency, where the run ends")
    parser.add_argument("--seconds", type=float, default=2.0, help="of the plain loop")
    parser.add_argument("--tiny", action="store_true", help="two small blocks on a CPU, to try every line")
    parser.add_argument("--out", type=Path, help="folder of the CSV; benchmarks/results by default")
    args = parser.parse_args()
    if args.tiny:
        args.interval, args.bundles, args.target = 4, 40, 0.5
    setting = Setting.of(args.tiny, args.batch_size, "deit_base_distilled_patch16_224")
    records = Records("pruning_loop", setting.device, args.out)
    model = setting.create()
    batches = [setting.batch(model, seed) for seed in range(4)]
    model = None
    images = setting.batch_size

    def add(case: str, ratio: float, step_s: float, settled_s: float, **more: Any) -> None:
        rate = images / settled_s
        records.add(case=case, batch_size=images, ratio=ratio, step_ms=1e3 * step_s, images_per_s=images / step_s,
                    settled_images_per_s=rate, **more)  # fmt: skip
        records.save()

    plain_ms = back_to_back(plain_step(setting, batches), args.seconds)[0]
    add("timm dense, eager", 1.0, plain_ms / 1e3, plain_ms / 1e3)
    loader = MarkedLoader(batches, args.interval // 4, setting.device)
    reason = ""
    try:
        rows = prune(setting, loader, args.target, args.bundles, args.interval)
    except Exception as broken:
        reason = first_line(broken)
        rows = segments(loader.marks, [], args.interval)[:1]  # before the first decision
    for row in rows:
        faster = {"times_timm": plain_ms / 1e3 / row["settled_s"], "times_timm_whole": plain_ms / 1e3 / row["step_s"]}
        add("nvit.prune", row["ratio"], row["step_s"], row["settled_s"], **faster)
    if reason:
        records.add(case="nvit.prune", batch_size=images, note=reason)
        records.save()
    return int(bool(reason))


if __name__ == "__main__":
    sys.exit(main())
