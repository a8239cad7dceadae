"""Real DeiT-Ti pruned to a share of its latency in onnxruntime, then timed in torch, onnxruntime and OpenVINO.

    NVIT_DATA=FOLDER python -m benchmarks.engine.runtimes [--target 0.65] [--latency-batch 8]

Runs `nvit prune --no-train --refit --runtime onnxruntime` on one thread of the CPU: the table's pieces are exported
and timed in onnxruntime. Then dense and pruned are timed in turn in each runtime, once its outputs are the model's own
on images of the data: a wrong one is not timed and ends the run. `ratio` is the pruned model's ms over the dense one's,
the median over rounds, in CPU time of the calling thread, which does all the work; `predicted_ratio` is the table's,
which speaks of onnxruntime alone, and `command_ratio` what the command itself measured there. Writes runtimes_cpu.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.library import MODEL, data_flags, data_folder, dense_model, images_of
from benchmarks.harness import Records, relative_error
from benchmarks.timing import in_turns, median_ratio, spread
from nvit import adapters
from nvit.analysis.evaluate import parameters
from nvit.cli import main as cli
from nvit.export.pieces import RUNTIMES, TORCH, ready, runtime_version
from nvit.structure import snapshot

PRUNED_FOR = "onnxruntime"
ALLOWED = 1e-4
"""How far a runtime's logits may be off, as a share of the largest."""


def calls(models: Mapping[str, nn.Module], images: Tensor, runtime: str) -> dict[str, Callable[[], Any]]:
    """What runs each model on `images` in a runtime and returns its logits, as the runtime holds them."""
    forwards = {name: partial(adapters.predict, model, images) for name, model in models.items()}
    if runtime == TORCH:
        return {name: torch.inference_mode()(forward) for name, forward in forwards.items()}
    wanted = [(model, partial(adapters.predict, model), images) for model in models.values()]
    return dict(zip(models, ready(wanted, runtime, torch.get_num_threads()), strict=True))


def logits(found: Any) -> Tensor:
    """A copy of what a call returned."""
    if isinstance(found, Tensor):
        return found.clone()
    return torch.from_numpy((found.numpy() if hasattr(found, "numpy") else found.data).copy())


def wrong(expected: Mapping[str, Tensor], runs: Mapping[str, Callable[[], Any]]) -> str | None:
    """Which model a runtime does not compute, or None."""
    for name, exact in expected.items():
        error = relative_error(logits(runs[name]()), exact)
        if error > ALLOWED:
            return f"{name}: logits are {error:.1e} of the largest from the model's, {ALLOWED:.0e} is allowed"
    return None


def compare(
    models: Mapping[str, nn.Module],
    images: Tensor,
    predicted_ratio: float,
    seconds: float,
    records: Records,
    command_ratio: float | None = None,
) -> int:
    """Rows of the `dense` and the `pruned` model in every runtime; 1 where a runtime computes something else."""
    expected = {name: run() for name, run in calls(models, images, TORCH).items()}
    for runtime in (TORCH, *RUNTIMES):
        runs = calls(models, images, runtime)
        if reason := wrong(expected, runs):
            print(f"{runtime}: {reason}", file=sys.stderr)
            return 1
        times = in_turns(runs, least=15, seconds=seconds, dropped=3, clock=time.thread_time)
        ratio = median_ratio(times["pruned"], times["dense"])
        for name, model in models.items():
            row = {"case": name, "runtime": runtime_version(runtime), "batch_size": len(images)}
            row["parameters"] = parameters(model)
            row |= zip(("ms", "p20_ms", "p80_ms"), (1e3 * s for s in spread(times[name])), strict=True)
            if name == "pruned":
                row["ratio"] = ratio
                if runtime == PRUNED_FOR:
                    row |= {"predicted_ratio": predicted_ratio, "ratio_error": predicted_ratio / ratio - 1}
                    row["command_ratio"] = command_ratio
            records.add(**row)
        records.save()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.65, help="of the dense latency in onnxruntime")
    parser.add_argument("--latency-batch", type=int, default=8, help="images a batch")
    parser.add_argument("--latency-seconds", type=float, default=40.0, help="for the table")
    parser.add_argument("--measure-seconds", default="0", help="to correct the aim by measuring; 0: the table's word")
    parser.add_argument("--images", type=int, default=64, help="calibration images; latency hardly depends on them")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the two models in a runtime")
    parser.add_argument("--out", type=Path, help="folder of the CSV; benchmarks/results by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    root = data_folder()
    records = Records("runtimes", folder=args.out)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = ["prune", "--model", MODEL, *data_flags(root), "--no-train", "--refit", "--runtime", PRUNED_FOR]
        command += ["--latency-target", str(args.target), "--latency-batch", str(args.latency_batch), "--threads", "1"]
        command += ["--latency-seconds", str(args.latency_seconds), "--images", str(args.images), "--batch-size", "32"]
        command += ["--measure-seconds", args.measure_seconds, "--eval-images", "32", "--out", str(out)]
        if code := cli.main(command):
            return code
        [found] = json.loads((out / "result.json").read_text())["snapshots"]
        [path] = out.glob("target-*")
        models = {"dense": dense_model(root), "pruned": snapshot.load(path)}
    where, classes = root / "imagenet_val1300", root / "imagenet_synsets.txt"
    images = torch.stack([image for image, _ in images_of(where, models["dense"], classes, args.latency_batch)])
    return compare(models, images, found["predicted_ratio"], args.seconds, records, found["measured_ratio"])


if __name__ == "__main__":
    sys.exit(main())
