"""What the tables of transfer and of CamVid share: the pruning run that they start from, and latency afterwards."""

import json
import sys
from pathlib import Path

import nvit
from benchmarks.accuracy.library import MODEL, data_flags, data_folder
from nvit.analysis import compare
from nvit.cli import main as cli
from nvit.latency.measure import sample_images

TARGETS = (0.65, 0.5)
PRUNE = [
    "--no-train", "--refit", "--images", "1000", "--batch-size", "25", "--latency-batch", "16",
    "--latency-seconds", "20",
    "--finetune-epochs", "3", "--finetune-lr", "1e-3", "--amp", "bf16",
    "--accept-labels", "--eval-images", "650", "--workers", "0",
]  # fmt: skip


def prune(run: Path) -> dict:
    """Both targets in one run; what its result.json says."""
    if not (run / "result.json").exists():
        targets = ["--latency-target", *map(str, TARGETS)]
        flags = [f for f in data_flags(data_folder()) if f != "--no-resize"]
        if code := cli.main(["prune", MODEL, *flags, *PRUNE, *targets, "--out", str(run)]):
            sys.exit(code)
    return json.loads((run / "result.json").read_text())


def ratio(dense: Path, small: Path) -> float:
    """Latency of the snapshot `small` as a share of `dense`, both on this machine, eight images a batch."""
    models = [nvit.load(path) for path in (dense, small)]
    return compare.measured(models, sample_images(models[0], 8), 8.0, "eager")[1]["measured_ratio"]
