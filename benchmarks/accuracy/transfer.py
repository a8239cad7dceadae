"""DeiT-Ti on CIFAR-10, dense and pruned first, with the same short schedule, on this machine (paper, Table 4).

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.transfer [--out RUNS] [--seeds 0 1]   # what is in RUNS is not redone

Prunes DeiT-Ti at 224 pixels on ImageNet's sample without CIFAR (refit, then three epochs towards the dense model),
gives each model a new head and finetunes it at 128 pixels, all training images once. 2000 test images evaluate; the
schedule was chosen on 1000 of the training images. `measured_ratio` is of latencies at 128 pixels. A row is written to
benchmarks/results/transfer_cpu.csv as soon as it is known.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.accuracy.library import MODEL, data_folder
from benchmarks.accuracy.rows import Rows
from benchmarks.accuracy.transfer_pruned import prune, ratio
from nvit.cli import main as cli

TUNE = [
    "--img-size", "128", "--new-head", "--epochs", "1", "--batch-size", "16", "--lr", "2.4e-3", "--min-lr", "1e-6",
    "--warmup-epochs", "0.02", "--grad-clip", "1", "--amp", "bf16", "--distill-weight", "0", "--eval-images", "2000",
    "--workers", "0", "--device", "cpu",
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
    rows = Rows("transfer")
    pruned = prune(given.out / "pruned")
    models = {1.0: ([MODEL, "--checkpoint", str(data_folder() / f"{MODEL}.safetensors")], pruned["dense"])}
    models |= {s["target"]: ([s["path"]], s) for s in pruned["snapshots"]}
    for seed in given.seeds:
        for target, (model, was) in models.items():
            out = given.out / f"{target:g}_{seed}"
            found = tune(model, seed, out)
            rows.add(
                case=f"target {target:g}",
                seed=seed,
                measured_ratio=1.0 if target == 1 else ratio(given.out / f"1_{seed}", out),
                imagenet_top1=was["top1"],
                **{key: found[key] for key in ("macs", "params", "top1")},
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
