"""A step of the whole pruning loop on a CPU against forward and backward of the same models alone.

    python -m benchmarks.engine.loop_step [--batch-size 8] [--rounds 9]

`nvit.prune` on DeiT-Ti with its unpruned self as teacher, random weights, batches in memory. Between two batches that
it asks for, the loader runs what cannot be left out: the teacher forward, the student forward, the loss, backward. CPU
seconds of one thread; both meet the machine's other work alike, and `over_alone` is the median of their ratios. First
dense, then masked by the first decision; the steps that take a decision are left out. Writes loop_step_cpu.csv.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import nvit
from benchmarks.harness import Records
from benchmarks.timing import median_ratio
from nvit import adapters, tasks
from nvit.training.distill import Objective, frozen

TARGET = 1.1
WARM_UP = 2


class Enough(Exception):
    """Ends the run."""


class Interleaved:
    """Yields one batch again and again; in between it runs `alone`, and notes what either took since the last batch.

    Args:
        steps: in all.

    Attributes:
        whole, alone: CPU seconds by step.
    """

    def __init__(self, batch: tuple[Tensor, Tensor], alone: Callable[[], object], steps: int) -> None:
        self.batch, self.call, self.steps = batch, alone, steps
        self.whole: list[float] = []
        self.alone: list[float] = []

    def __len__(self) -> int:
        return self.steps + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.steps):
            start = time.process_time()
            yield self.batch
            end = time.process_time()
            self.call()
            self.whole.append(end - start)
            self.alone.append(time.process_time() - end)
        raise Enough


def steps(model: nn.Module, batch_size: int, rounds: int, bundles: int) -> tuple[Interleaved, nvit.PruneConfig]:
    """One run of `nvit.prune` through `rounds` steps of the dense model, a decision, and as many of the masked one."""
    config = nvit.PruneConfig(
        batch_size=batch_size,
        latency_target=0.05,
        interval=WARM_UP + rounds + 1,
        bundles_per_step=bundles,
        distill_weight=50.0,
        lr=1e-5,
        seed=0,
    )
    adapters.find(model).prepare(model)
    objective = Objective.of(config, tasks.of("auto", model), frozen(copy.deepcopy(model)))
    size = (batch_size, 3, *model.patch_embed.img_size)
    batch = torch.randn(size), torch.randint(model.num_classes, (batch_size,))

    def alone() -> None:
        objective(model, *batch).backward()
        model.zero_grad(set_to_none=True)

    loader = Interleaved(batch, alone, 2 * config.interval - 1)
    try:
        nvit.prune(model, loader, config, nvit.LatencyTable.analytic(model))
    except Enough:
        return loader, config
    raise AssertionError("the run met its target before it was through; ask for fewer bundles")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9, help="steps timed, dense and masked")
    parser.add_argument("--bundles", type=int, default=300, help="that leave at the decision in between")
    parser.add_argument("--tiny", action="store_true", help="two small blocks, to try every line")
    parser.add_argument("--out", type=Path, help="folder of the CSV; benchmarks/results by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 2, "num_classes": 10} if args.tiny else {}
    model = timm.create_model("deit_tiny_patch16_224", **options).eval()
    loader, config = steps(model, args.batch_size, args.rounds, 20 if args.tiny else args.bundles)
    records = Records("loop_step", torch.device("cpu"), args.out)
    for case, first in (("dense", WARM_UP), ("masked", config.interval + WARM_UP)):
        whole, alone = (t[first : first + args.rounds] for t in (loader.whole, loader.alone))
        records.add(
            case=case,
            batch_size=args.batch_size,
            whole_cpu_ms=1e3 * statistics.median(whole),
            alone_cpu_ms=1e3 * statistics.median(alone),
            over_alone=median_ratio(whole, alone),
            target_over_alone=TARGET,
        )
    records.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
