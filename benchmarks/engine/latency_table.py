"""Predicted against measured latency of random width choices.

A latency table is measured, then models of random widths (multiples of the bundle size, another choice in every block)
are timed in turn with the dense one. Errors are given in milliseconds and as a ratio to dense, predicted and measured
each by their own dense latency, which leaves out what changed on the machine between the two measurements.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import timm
import torch

from benchmarks.harness import Records
from nvit import adapters
from nvit.latency.clock import time_models
from nvit.latency.table import LatencyTable
from nvit.structure.compact import compact
from nvit.structure.masks import full_masks, widths

TARGET = 0.05


def random_masks(groups, generator: torch.Generator):
    """Keep a random number of bundles in every group."""
    masks = {}
    for g in groups:
        bundles = -(-g.size // g.multiple)
        kept = int(torch.randint(1, bundles + 1, (), generator=generator)) * g.multiple
        masks[g.name] = torch.arange(g.size) < min(kept, g.size)
    return masks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--choices", type=int, default=8, help="random width choices")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the table, and again for the models")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    records, generator = Records("latency_table"), torch.Generator().manual_seed(args.seed)

    model = timm.create_model(args.model).eval()
    table = LatencyTable.measure(model, args.batch_size, seconds=args.seconds)
    adapter = adapters.find(model)
    groups = adapter.groups(adapter.prepare(model))
    choices = [full_masks(groups)] + [random_masks(groups, generator) for _ in range(args.choices)]
    models = [compact(model, groups, masks).eval() for masks in choices]
    blocks = [widths(groups, masks) for masks in choices]
    for small, masks, expected in zip(models, choices, blocks, strict=True):
        again = adapter.groups(small)
        if widths(again, full_masks(again)) != expected:
            print(f"the model does not have the widths of its masks ({len(masks)} groups)", file=sys.stderr)
            return 1

    measured = time_models(models, torch.randn(args.batch_size, *model.pretrained_cfg["input_size"]), args.seconds)
    errors, ratio_errors = [], []
    for i, (ms, b) in enumerate(zip(measured, blocks, strict=True)):
        predicted = table.model_ms(b)
        error = predicted / ms - 1
        ratio_error = (predicted / table.dense_ms) / (ms / measured[0]) - 1
        if i:
            errors.append(abs(error))
            ratio_errors.append(abs(ratio_error))
        records.add(
            case="dense" if i == 0 else f"random {i}",
            model=args.model,
            batch_size=args.batch_size,
            predicted_ms=predicted,
            measured_ms=ms,
            error=error,
            predicted_ratio=predicted / table.dense_ms,
            measured_ratio=ms / measured[0],
            ratio_error=ratio_error,
        )
    records.add(
        case=f"median of absolute errors, target {TARGET}",
        model=args.model,
        batch_size=args.batch_size,
        error=statistics.median(errors),
        ratio_error=statistics.median(ratio_errors),
    )
    records.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
