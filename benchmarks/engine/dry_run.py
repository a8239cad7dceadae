"""What `nvit prune --dry-run` foretells, and what the run then takes: seconds and the most memory held.

    NVIT_DATA=FOLDER python -m benchmarks.engine.dry_run [--only digits]

Plan and run of the same command, one after the other, each in a process of its own: one shot and training of the
bundled model, and one shot with a refit of real DeiT-Ti. Writes dry_run_cpu.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.accuracy.library import MODEL, data_flags, data_folder
from benchmarks.harness import Records

COMMON = (
    "--threads",
    "1",
    "--device",
    "cpu",
    "--latency-seconds",
    "8",
    "--measure-seconds",
    "1",
    "--table",
    "analytic",
)
CASES = {
    "digits, one shot": ("digits", ("--no-train", "--latency-target", "0.7", "0.5", "--images", "1024")),
    "digits, training": ("digits", ("--latency-target", "0.7", "--interval", "25", "--finetune-epochs", "4")),
    "deit, one shot, refit": (
        "deit",
        ("--no-train", "--refit", "--images", "128", "--batch-size", "32", "--latency-target", "0.65"),
    ),
}
PROGRAM = """
import json, resource, sys, time
from nvit.cli import main, prune
start, kept = time.monotonic(), {}
plan = prune.plan_prune
def planned(command, progress):
    kept["plan"] = plan(command, progress)
    return kept["plan"]
prune.plan_prune = planned
code = main.main(sys.argv[1:])
p = kept.get("plan")
found = {"wall": time.monotonic() - start, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
found |= {} if p is None else {"seconds": p.seconds, "peak": p.peak}
print("FOUND", json.dumps(found))
sys.exit(code)
"""
WITHIN = 0.3


def ran(words: list[str]) -> dict[str, float]:
    """What one `nvit` command in a process of its own says of itself."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"nvit {' '.join(words)} failed: {done.stderr.strip().splitlines()[-1]}")
    print(done.stdout, flush=True)
    return json.loads(done.stdout.rpartition("FOUND ")[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("digits", "deit"), default="")
    parser.add_argument("--eval-images", type=int, default=128)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    records = Records("dry_run")
    for case, (model, flags) in CASES.items():
        if args.only not in ("", model):
            continue
        with tempfile.TemporaryDirectory() as folder:
            data = ["--model", MODEL, *data_flags(data_folder())] if model == "deit" else ["--model", "digits"]
            words = ["prune", *data, *COMMON, *flags, "--eval-images", str(args.eval_images), "--latency-batch", "8"]
            words += ["--out", str(Path(folder) / "run")]
            start = time.monotonic()
            planned = ran([*words, "--dry-run"])
            took = time.monotonic() - start
            run = ran(words)
            seconds = json.loads((Path(folder) / "run" / "result.json").read_text())["seconds"]
        off, off_memory = planned["seconds"] / seconds - 1, planned["peak"] / run["rss"] - 1
        records.add(
            case=case,
            foretold_seconds=planned["seconds"],
            seconds=seconds,
            seconds_off=off,
            foretold_mb=planned["peak"] / 1e6,
            mb=run["rss"] / 1e6,
            memory_off=off_memory,
            within=max(abs(off), abs(off_memory)) <= WITHIN,
            dry_run_seconds=took,
        )
        records.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
