"""DeiT-Ti at several latencies in one run on this machine, from real weights and a thousand real images.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.deit_tiny [--out RUN]      # a finished run in RUN is only read again

Runs `nvit prune recipes/deit_tiny_cpu.toml` and `nvit compare` on its snapshots, and writes
benchmarks/results/deit_tiny_cpu.csv and deit_tiny_cpu.png from what they found.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.accuracy.library import MODEL, data_flags, data_folder
from benchmarks.harness import RESULTS, Records
from nvit.analysis.accuracy_curve import Against, plot_accuracy
from nvit.analysis.figure import PIXELS
from nvit.cli import main as cli

RECIPE = Path(__file__).parents[2] / "recipes/deit_tiny_cpu.toml"
FIGURE = RESULTS / "deit_tiny_cpu.png"
IMAGES = 1300
"""That the recipe evaluates on."""


def measure(out: Path) -> int:
    """Prune, then compare; 0 or the exit code of what failed."""
    flags = data_flags(data_folder())
    if code := cli.main(["prune", str(RECIPE), *flags, "--out", str(out)]):
        return code
    snapshots = [s["path"] for s in json.loads((out / "result.json").read_text())["snapshots"]]
    compare = ["compare", MODEL, *snapshots, *flags, "--latency-batch", "16"]
    return cli.main([*compare, "--table", str(out / "latency_table.json"), "--out", str(out / "compare")])


def plot(rows: Sequence[Mapping], path: Path, pixels: int = PIXELS) -> None:
    """Accuracy against measured latency and against multiply-accumulates, as shares of the dense model's."""
    dense = max(float(r["macs"]) for r in rows)
    shares = [{k: float(r[k]) for k in ("top1", "measured_ratio")} | {"macs": float(r["macs"]) / dense} for r in rows]
    against = [Against("measured_ratio", "measured share of dense latency"), Against("macs", "share of dense MACs")]
    title = "DeiT-Ti at three latencies in one run, a CPU, 16 images a batch"
    plot_accuracy({"nvit prune, 2 epochs": shares}, against, path, images=IMAGES, title=title, pixels=pixels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/deit_tiny_cpu"), help="folder of the run")
    out = parser.parse_args().out
    if not (out / "compare" / "result.json").exists() and (code := measure(out)):
        return code
    run = json.loads((out / "result.json").read_text())
    memory = [m["peak_memory"] for m in json.loads((out / "compare" / "result.json").read_text())["models"]]
    rows = [{"target": 1.0, "predicted_ratio": 1.0, "measured_ratio": 1.0} | run["dense"], *run["snapshots"]]
    records = Records("deit_tiny")
    for row, peak in zip(rows, memory, strict=True):
        keys = ("predicted_ratio", "measured_ratio", "latency_ms", "params", "macs", "top1")
        records.add(
            case=f"target {row['target']:g}", peak_memory=peak, seconds=run["seconds"], **{k: row[k] for k in keys}
        )
    records.save()
    plot(rows, FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
