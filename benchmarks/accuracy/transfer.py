"""DeiT-Ti on CIFAR-10, dense and pruned first, with the same short schedule, on this machine (paper, Table 4).

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.transfer [--out RUNS] [--seeds 0 1]   # what is in RUNS is not redone

Prunes DeiT-Ti at 112 pixels on ImageNet's sample without CIFAR (refit, then three epochs towards the dense model),
gives each model a new head and finetunes it: all training images seen once. 2000 test images evaluate. A row is
written to benchmarks/results/transfer_cpu.csv as soon as it is known.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.accuracy.library import MODEL, data_folder
from benchmarks.accuracy.rows import Rows
from benchmarks.accuracy.transfer_pruned import SIZE, prune
from nvit.cli import main as cli

TUNE = [
    "--new-head", "--epochs", "1", "--batch-size", "32", "--lr", "2.4e-3", "--min-lr", "1e-6", "--warmup-epochs",
    "0.02", "--grad-clip", "1", "--distill-weight", "0", "--eval-images", "2000", "--workers", "0", "--device", "cpu",
]  # fmt: skip


def tune(model: list[str], seed: int, out: Path) -> dict:
    """Finetune one model; what its result.json says."""
    if not (out / "result.json").exists():
        where = ["--data", str(data_folder() / "cifar10"), "--seed", str(seed), "--out", str(out)]
        if code := cli.main(["finetune", *model, *TUNE, *where]):
            sys.exit(code)
    return json.loads((out / "result.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    out = given.out
    rows = Rows("transfer")
    weights = ["--checkpoint", str(data_folder() / f"{MODEL}.safetensors")]
    dense = [MODEL, *weights, *SIZE]
    pruned = prune(out / "pruned")
    models = {1.0: (dense, {"measured_ratio": 1.0} | pruned["dense"])}
    models |= {s["target"]: ([s["path"]], s) for s in pruned["snapshots"]}
    for seed in given.seeds:
        for target, (model, was) in models.items():
            found = tune(model, seed, out / f"{target:g}_{seed}")
            rows.add(
                case=f"target {target:g}",
                seed=seed,
                measured_ratio=was["measured_ratio"],
                macs=found["macs"],
                params=found["params"],
                imagenet_top1=was["top1"],
                top1=found["top1"],
                seconds=found["seconds"],
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
