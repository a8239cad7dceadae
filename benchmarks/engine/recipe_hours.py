"""GPU hours that a recipe of DeiT-B on ImageNet takes, worked out from images per second measured on one H200.

    python -m benchmarks.engine.recipe_hours recipes/modern/*.toml

From nvidia_h200_pruning_loop.csv: the pruning loop with distillation at several widths, what a decision costs there (a
new graph, new shapes), and how many bundles lead from one ratio to the next. Images were on the device: decoding and
augmenting is not in it, nor is a refit, which has not been timed on a GPU.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness import RESULTS
from nvit.config import PruneConfig

IMAGES = 1_281_167
"""Of ImageNet-1K's training set."""

BUNDLES, INTERVAL = 400, 20
"""That left at each decision of that benchmark, and the steps between two."""


def measured() -> list[dict[str, float]]:
    """Rows of the loop by the ratio of dense latency, widest first."""
    with (RESULTS / "nvidia_h200_pruning_loop.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["case"] == "nvit.prune"]
    keys = ("ratio", "step_ms", "batch_size", "settled_images_per_s")
    return sorted(({k: float(r[k]) for k in keys} for r in rows), key=lambda r: -r["ratio"])


def rate(ratio: float, rows: Sequence[dict[str, float]]) -> float:
    """Images per second with a teacher, between decisions, at a share of the dense latency."""
    narrow = sorted(rows, key=lambda r: r["ratio"])
    return float(np.interp(ratio, [r["ratio"] for r in narrow], [r["settled_images_per_s"] for r in narrow]))


def decision_s(rows: Sequence[dict[str, float]]) -> float:
    """Seconds that a decision and what follows from it take, mean over the loop's."""
    settled = [1e3 * r["batch_size"] / r["settled_images_per_s"] for r in rows]
    return float(np.mean([INTERVAL * (r["step_ms"] - ms) / 1e3 for r, ms in zip(rows, settled, strict=True)]))


def hours(config: PruneConfig) -> dict[str, float]:
    """GPU hours by stage of a recipe with one target: `pruning` (0 where nothing is trained meanwhile), `epochs` that
    the pruning takes, and `finetuning`."""
    rows, (target,) = measured(), config.latency_target
    spent = {"pruning": 0.0, "epochs": 0.0}
    if config.train:
        ratios = [r["ratio"] for r in rows]
        bundles = np.interp(-target, [-r for r in ratios], BUNDLES * np.arange(len(ratios)))
        decisions = bundles / config.bundles_per_step
        images = decisions * config.interval * config.batch_size
        mean_rate = np.mean([rate(r, rows) for r in np.linspace(1, target, 20)])
        spent = {"pruning": (images / mean_rate + decisions * decision_s(rows)) / 3600, "epochs": images / IMAGES}
    return spent | {"finetuning": config.finetune_epochs * IMAGES / rate(target, rows) / 3600}


def main() -> int:
    from nvit.cli.flags.prune import PruneCommand
    from nvit.cli.recipe import from_toml

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE")
    for path in parser.parse_args().recipes:
        found = hours(from_toml(PruneCommand, path).config)
        total = found["pruning"] + found["finetuning"]
        epochs = f" ({found['epochs']:.2f} epochs)" if found["epochs"] else ""
        print(
            f"{path}: {total:.1f} hours; pruning {found['pruning']:.2f}{epochs}, finetuning {found['finetuning']:.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
