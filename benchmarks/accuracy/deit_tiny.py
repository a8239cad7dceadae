"""DeiT-Ti at several latencies in one run on this machine, from real weights and a thousand real images.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.deit_tiny [--out RUN]      # a finished run in RUN is only read again

Runs `nvit prune recipes/deit_tiny_cpu.toml` and `nvit compare` on its snapshots, and writes
benchmarks/results/deit_tiny_cpu.csv and deit_tiny_cpu.png from what they found.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.accuracy.library import MODEL, data_flags, data_folder
from benchmarks.harness import RESULTS, Records
from nvit.cli import main as cli

RECIPE = Path(__file__).parents[2] / "recipes/deit_tiny_cpu.toml"
FIGURE = RESULTS / "deit_tiny_cpu.png"


def measure(out: Path) -> int:
    """Prune, then compare; 0 or the exit code of what failed."""
    flags = data_flags(data_folder())
    if code := cli.main(["prune", str(RECIPE), *flags, "--out", str(out)]):
        return code
    snapshots = [s["path"] for s in json.loads((out / "result.json").read_text())["snapshots"]]
    compare = ["compare", MODEL, *snapshots, *flags, "--latency-batch", "16"]
    return cli.main([*compare, "--table", str(out / "latency_table.json"), "--out", str(out / "compare")])


def plot(rows: list[dict]) -> None:
    """Accuracy against measured milliseconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.plot([r["latency_ms"] for r in rows], [r["top1"] for r in rows], marker="o")
    for r in rows:
        axes.annotate(
            f"{r['measured_ratio']:.2f}×", (r["latency_ms"], r["top1"]), (-5, 6), textcoords="offset points", ha="right"
        )
    axes.set(xlabel="measured ms, batch 16, CPU", ylabel="top-1 %, 1300 images", title="DeiT-Ti, one run, CPU")
    axes.set_xlim(left=0)
    figure.savefig(FIGURE, dpi=150)


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
    plot(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
