"""DeiT-Ti with SETR's naive head on CamVid, dense and pruned first, with the same short schedule, on this machine.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.camvid [--out RUNS] [--pruned RUN] [--seeds 0 1]

The pruned model is that of `benchmarks.accuracy.transfer`, pruned on ImageNet's sample before there was a head; what is
in RUNS is not done again. Images are 176 × 240 pixels, half of CamVid's here; its 233 test images evaluate.
`as a segmenter`: the dense one with its trained head, pruned by the loss of pixels (one shot and a refit), then trained
towards itself unpruned for as many epochs again. `halfway` does the same in 15 epochs of training in all: the dense one
gets 7 of them and a schedule of its own, the pruned one 8. A row is written to benchmarks/results/camvid_cpu.csv as
soon as it is known.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.accuracy.library import MODEL, data_folder
from benchmarks.accuracy.rows import Rows
from benchmarks.accuracy.transfer_pruned import prune, ratio
from nvit.cli import main as cli

TARGET = 0.65
KEYS = ("macs", "params", "miou", "pixel_accuracy")
SIZE = ["--img-size", "176", "240"]
TUNE = [
    "--task", "segmentation", "--ignore-label", "11", "--batch-size", "8", "--lr", "1.6e-2",
    "--min-lr", "1e-6", "--warmup-epochs", "0.3", "--grad-clip", "1", "--color-jitter", "0.3", "--amp", "bf16",
    "--distill-weight", "0", "--workers", "0", "--device", "cpu",
]  # fmt: skip
PRUNE = [
    "--task", "segmentation", "--ignore-label", "11", "--no-train", "--refit", "--images", "367", "--batch-size", "8",
    "--latency-target", str(TARGET), "--latency-batch", "8", "--latency-seconds", "20", "--finetune-lr",
    "1.6e-2", "--grad-clip", "1", "--color-jitter", "0.3", "--amp", "bf16", "--workers", "0", "--device", "cpu",
]  # fmt: skip
EPOCHS, BEFORE = 15, 7


def tune(model: list[str], seed: int, out: Path, epochs: int = EPOCHS) -> dict:
    """Put a head on one model and train it; what its result.json says."""
    if not (out / "result.json").exists():
        camvid = data_folder() / "camvid"
        where = ["--data", str(camvid), "--eval-data", str(camvid / "test"), "--seed", str(seed), "--out", str(out)]
        if code := cli.main(["finetune", *model, *SIZE, *TUNE, "--epochs", str(epochs), *where]):
            sys.exit(code)
    return json.loads((out / "result.json").read_text())


def prune_segmenter(dense: Path, seed: int, out: Path, epochs: int = EPOCHS) -> dict:
    """Prune one with its head; what result.json says of the snapshot."""
    if not (out / "result.json").exists():
        camvid = data_folder() / "camvid"
        where = ["--data", str(camvid), "--eval-data", str(camvid / "test"), "--seed", str(seed), "--out", str(out)]
        if code := cli.main(["prune", str(dense), *PRUNE, "--finetune-epochs", str(epochs), *where]):
            sys.exit(code)
    return json.loads((out / "result.json").read_text())["snapshots"][0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/camvid"), help="folder of the runs")
    parser.add_argument("--pruned", type=Path, default=Path("runs/transfer/pruned"), help="the pruning run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    rows, weights = Rows("camvid"), data_folder() / f"{MODEL}.safetensors"
    small = next(s["path"] for s in prune(given.pruned)["snapshots"] if s["target"] == TARGET)
    models = {1.0: [MODEL, "--checkpoint", str(weights)], TARGET: [small]}
    for seed in given.seeds:
        for target, model in models.items():
            out = given.out / f"{target:g}_{seed}"
            found = tune(model, seed, out)
            rows.add(
                case=f"target {target:g}",
                seed=seed,
                measured_ratio=1.0 if target == 1 else ratio(given.out / f"1_{seed}", out),
                **{key: found[key] for key in KEYS},
            )
        whole, half = given.out / f"1_{seed}", given.out / f"half_{seed}"
        tune(models[1.0], seed, half, BEFORE)
        for case, dense, epochs in (("as a segmenter", whole, EPOCHS), ("halfway", half, EPOCHS - BEFORE)):
            name = "segmenter" if dense == whole else "halfway"
            found = prune_segmenter(dense, seed, given.out / f"{name}_{seed}", epochs)
            rows.add(
                case=f"target {TARGET:g}, {case}",
                seed=seed,
                measured_ratio=ratio(whole, Path(found["path"])),
                **{key: found[key] for key in KEYS},
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
