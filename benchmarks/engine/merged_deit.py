"""DeiT-B whose tokens merge, dense and cut to NViT-B's widths: latency predicted, and measured; bf16 on a GPU.

    python -m benchmarks.engine.merged_deit [--batch-size 256]

As many tokens merge in every block, down to a share of the multiply-accumulates. On a GPU a measurement is a replay of
a CUDA graph. What merging takes is measured first on other schedules of the dense model, as a run of `nvit prune --only
widths tokens` does, and the table of widths with it: `predicted_ratio` is what that run would say. `ratio` is of
the dense model's latency, timed in turn; `plain_ms` is without kernels. Writes <GPU>_merged_deit.csv.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.engine.library import TINY, WIDTHS, Setting, first_line, uniform
from benchmarks.harness import Records, relative_error
from nvit import adapters
from nvit.analysis.compare import measured
from nvit.latency.clock import as_deployed
from nvit.latency.table import LatencyTable
from nvit.layers import functional
from nvit.layers.merging import counts
from nvit.prune.merging_cost import Rung, measure_merging
from nvit.prune.timing import ratios_of
from nvit.prune.tokens import schedules, work_of
from nvit.structure.compact import compact
from nvit.structure.masks import full_masks, widths

SHARES = (0.65, 0.5, 0.4)
"""Of the multiply-accumulates of a model whose tokens stay."""
FAMILY = "uniform"


@torch.inference_mode()
def wrong(model: nn.Module, images: Tensor) -> float:
    """How far answers with kernels are from those in plain torch, in float32, as a share of the largest; near ties that
    rounding decides let single tokens merge elsewhere."""
    exact = copy.deepcopy(model).float()
    few = images[:4].float()
    ours = exact(few)
    with functional.kernels(False):
        return relative_error(ours, exact(few))


def in_turn(dense: nn.Module, model: nn.Module, images: Tensor, seconds: float, mode: str) -> dict[str, Any]:
    """Latency beside the dense model's, both in turn, with kernels and without (`plain_ms`).

    Raises:
        AssertionError: kernels give other answers.
    """
    error = wrong(model, images)
    assert error < 2e-2, f"answers with and without kernels are {error:.1e} of the largest apart"
    _, ours = measured([dense, model], images, seconds, mode)
    with functional.kernels(False):
        _, plain = measured([dense, model], images, seconds, mode)
    row = {"measured_ms": ours["latency_ms"], "plain_ms": plain["latency_ms"], "images_per_s": ours["images_per_s"]}
    return row | {"ratio": ours["measured_ratio"], "spread": ours["measured_spread"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--table-seconds", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=1.0, help="a model")
    parser.add_argument("--tiny", action="store_true", help="two small blocks on a CPU, to try every line")
    parser.add_argument("--out", type=Path, help="folder of the CSV; benchmarks/results by default")
    args = parser.parse_args()
    setting = Setting.of(args.tiny, args.batch_size)
    mode, dtype = as_deployed(setting.device)
    records = Records("merged_deit", setting.device, args.out)
    model = setting.create()
    images = setting.batch(model)[0].to(dtype)

    start = time.perf_counter()
    table = LatencyTable.measure(model, setting.batch_size, setting.device, dtype, seconds=args.table_seconds)
    adapter = adapters.find(model)
    groups = adapter.groups(adapter.prepare(model))
    cuts = {"dense": full_masks(groups)}
    cuts |= {name: uniform(groups, kept) for name, kept in (TINY if args.tiny else {"B": WIDTHS["B"]}).items()}
    models = {name: compact(model, groups, masks).eval() for name, masks in cuts.items()}
    ratios = ratios_of(table.setting, args.seconds, lambda: models["dense"])
    cost, dense_work = measure_merging(models["dense"], ratios), work_of(models["dense"])
    print(f"table and what merging takes: {time.perf_counter() - start:.0f} s", file=sys.stderr)

    failed, dense = 0, copy.deepcopy(models["dense"]).to(dtype)
    for name, masks in cuts.items():
        rung = Rung(models[name], table.ratio(widths(groups, masks)), cost, dense_work)
        for share in (1.0, *SHARES):
            enough = lambda m, most=share * rung.whole, work=rung.work: work(m) <= most  # noqa: E731
            merges = schedules(models[name], enough).get(FAMILY) if share < 1 else ()
            if merges is None:  # a few blocks cannot merge so much
                continue
            merged = adapters.merge_(copy.deepcopy(models[name]), merges).to(dtype)
            tokens = counts(adapters.of(merged).tokens(merged), merges)
            row = {"case": name, "batch_size": len(images), "dtype": str(dtype)[6:], "mode": mode, "macs": share}
            row |= {"merged_a_block": max(merges, default=0), "tokens_left": tokens[-1]}
            try:
                more = in_turn(dense, merged, images, args.seconds, mode)
            except Exception as broken:  # the other models are measured all the same
                failed += 1
                more = {"note": first_line(broken)}
            else:
                predicted = rung.predicted(merges)
                more |= {"predicted_ratio": predicted, "ratio_error": predicted / more["ratio"] - 1}
            records.add(**row | more)
            records.save()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
