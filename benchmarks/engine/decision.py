"""One pruning decision over every unit of DeiT-B (39,312): a few bundles, or down to a latency target."""

from __future__ import annotations

import argparse
import statistics
import sys

import timm
import torch

from benchmarks.harness import Records
from benchmarks.timing import cpu_seconds
from nvit import adapters
from nvit.latency.table import LatencyTable
from nvit.selection.greedy import drop_cheapest
from nvit.selection.lagrangian import drop_to_target
from nvit.structure.masks import full_masks, widths

TARGET_MS = 50.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_base_patch16_224")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = Records("decision")

    with torch.device("meta"):
        model = timm.create_model(args.model)
    table = LatencyTable.analytic(model)
    adapter = adapters.find(model)
    groups = adapter.groups(adapter.prepare(model))
    generator = torch.Generator().manual_seed(0)
    scores = {g.name: torch.rand(g.size, generator=generator) for g in groups}
    masks, units = full_masks(groups), sum(g.size for g in groups)
    calls = {f"{n} bundles": lambda n=n: drop_cheapest(scores, masks, groups, table, n) for n in (2, 16, 64)}
    calls |= {
        f"to {ratio:g} of dense": lambda r=ratio: drop_to_target(scores, masks, groups, table, r * table.dense_ms)[0]
        for ratio in (0.8, 0.5, 0.2)
    }

    for name, call in calls.items():
        ratio = table.ratio(widths(groups, call()))
        if (name.startswith("to") and not ratio <= float(name.split()[1])) or ratio >= 1:
            print(f"{name}: the decision is wrong, it leaves {ratio:.4f} of dense latency", file=sys.stderr)
            return 1
    for name, seconds in cpu_seconds(calls, args.rounds).items():
        ms = 1e3 * statistics.median(seconds)
        records.add(case=name, model=args.model, units=units, cpu_ms=ms, target_ms=TARGET_MS, met=ms < TARGET_MS)
    records.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
