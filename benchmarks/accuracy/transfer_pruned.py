"""The pruning run that the tables of transfer and of CamVid start from."""

import json
import sys
from pathlib import Path

from benchmarks.accuracy.library import MODEL, data_flags, data_folder
from nvit.cli import main as cli

SIZE = ["--img-size", "112"]
TARGETS = (0.65, 0.5)
PRUNE = [
    "--no-train", "--refit", "--images", "1000", "--batch-size", "25", "--latency-batch", "16",
    "--latency-seconds", "20",
    "--finetune-epochs", "3", "--finetune-lr", "1e-3", "--accept-labels", "--eval-images", "650", "--workers", "0",
]  # fmt: skip


def prune(run: Path) -> dict:
    """Both targets in one run; what its result.json says."""
    if not (run / "result.json").exists():
        targets = ["--latency-target", *map(str, TARGETS)]
        flags = [f for f in data_flags(data_folder()) if f != "--no-resize"]
        if code := cli.main(["prune", MODEL, *flags, *SIZE, *PRUNE, *targets, "--out", str(run)]):
            sys.exit(code)
    return json.loads((run / "result.json").read_text())
