"""Latency targets of real DeiT-Ti, predicted and measured, on a quiet machine and on one with background load.

    NVIT_DATA=FOLDER python -m benchmarks.engine.target_met [--load 0 2]

Runs `nvit prune --no-train` to three targets on one thread, by the table's word alone and with the aim corrected by
measuring (`--measure-seconds`), each with so many other processes that multiply matrices meanwhile. `measured_ratio` is
the command's last measurement, of all its models in turn, which no decision was taken on. Writes target_met_cpu.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.accuracy.library import MODEL, data_flags, data_folder
from benchmarks.harness import Records
from nvit.cli import main as cli

TARGETS = ("0.8", "0.65", "0.5")
WITHIN = 0.03


def _busy() -> None:
    torch.set_num_threads(1)
    a = torch.randn(512, 512)
    while True:
        a = torch.nn.functional.normalize(a @ a)


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """So many processes that multiply matrices, each on one thread, until the end."""
    found = [multiprocessing.get_context("spawn").Process(target=_busy, daemon=True) for _ in range(processes)]
    for process in found:
        process.start()
    try:
        yield
        assert all(process.is_alive() for process in found), "the background load ended before the measurement did"
    finally:
        for process in found:
            process.terminate()
            process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=int, nargs="+", default=[0, 2], help="processes in the background")
    parser.add_argument("--images", type=int, default=64, help="calibration images; latency hardly depends on them")
    parser.add_argument("--latency-batch", type=int, default=8)
    parser.add_argument("--aims", choices=("measured", "table"), nargs="+", default=["measured", "table"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    records, flags = Records("target_met"), data_flags(data_folder())
    for aim in args.aims:
        for processes in args.load:
            with tempfile.TemporaryDirectory() as folder, load(processes):
                os.environ["NVIT_CACHE"] = f"{folder}/cache"
                out = Path(folder) / "run"
                command = ["prune", "--model", MODEL, *flags, "--no-train", "--latency-target", *TARGETS]
                command += ["--images", str(args.images), "--batch-size", "32", "--eval-images", "32", "--threads", "1"]
                command += ["--latency-batch", str(args.latency_batch), "--out", str(out)]
                if code := cli.main(command + (["--measure-seconds", "0"] if aim == "table" else [])):
                    return code
                found = json.loads((out / "result.json").read_text())
            for row in found["snapshots"]:
                off = row["measured_ratio"] / row["target"] - 1
                records.add(
                    case=f"target {row['target']:g}",
                    background_processes=processes,
                    aim=aim,
                    target=row["target"],
                    predicted_ratio=row["predicted_ratio"],
                    measured_ratio=row["measured_ratio"],
                    measured_spread=row["measured_spread"],
                    off_target=off,
                    within=abs(off) <= WITHIN,
                    said_met=row["met"],
                    seconds=found["seconds"],
                )
            records.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
