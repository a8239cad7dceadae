"""The paper's analyses of real DeiT-Ti by the commands of `nvit analyze`, their numbers kept (docs/analyze.md).

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.analyses [STEP …] [--out RUNS]     # what is in RUNS is not redone

Steps: `sensitivity` (Tab. 5: 96 images of imagenet_sample1000, a probe a batch, in batches of 4 and of 16), `attention`
(App. C.1: 64 images of imagenet_val1300, dense and pruned), `widths` (Fig. 4 and insight 1) and `rule` (Sec. 5.4) of
the pruning runs below, `latency` (App. A.3: models of random widths on one CPU thread, by its own CPU time: 12 of them,
two images a batch, by a table of 6 s, and 6 of them, 16 images, by the table of the pruning run, of 20 s).
`shot` prunes in one shot, without training or refit, by `fisher` to five latencies, counted. `widths` and `rule` are of
that run and of the one that `benchmarks.accuracy.transfer` starts from (--pruned; refitted and trained), `attention` of
the second.

Each step's rows go into benchmarks/results/analyses_<step>_cpu.csv when it is done; `python -m docs.fill_tables
--figures` draws the pages' figures from there.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.library import MODEL, data_flags, data_folder
from benchmarks.accuracy.transfer_pruned import prune
from benchmarks.harness import Records
from nvit.cli import main as cli

TARGETS = ("0.8", "0.65", "0.5", "0.35", "0.25")
BATCHES = (4, 16)
ONE_THREAD = ("--device", "cpu", "--threads", "1")
FISHER = [
    "--no-train", "--accept-labels", "--images", "200", "--table", "analytic", "--latency-batch", "1",
    "--latency-seconds", "2", "--workers", "0", "--criterion", "fisher", "--latency-target", *TARGETS,
]  # fmt: skip


def found(out: Path, *words: str) -> dict[str, Any]:
    """What a command leaves in its folder's result.json; a command that ran to its end is not run again."""
    if not (out / "result.json").exists() and (code := cli.main([*words, "--out", str(out)])):
        sys.exit(code)
    return json.loads((out / "result.json").read_text())


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(row: Mapping[str, str]) -> dict[str, Any]:
    """A row of a command's CSV; models by the last words of their folders, so that no path of a machine is kept."""
    named = {key: "/".join(Path(value).parts[-2:]) for key, value in row.items() if key == "model"}
    return {key: _number(value) for key, value in row.items()} | named


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def keep(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    records = Records(f"analyses_{name}")
    for row in rows:
        records.add(**row)
    records.save()


def dense() -> list[str]:
    return [MODEL, "--checkpoint", str(data_folder() / f"{MODEL}.safetensors"), *ONE_THREAD]


def sensitivity(out: Path, pruned: Path) -> None:
    rows = []
    for batch in BATCHES:
        images = ["--data", str(data_folder() / "imagenet_sample1000" / "val"), "--accept-labels"]
        size = ["--samples", "96", "--batch-size", str(batch), "--probes", "1"]
        folder = out / f"sensitivity_{batch}"
        result = found(folder, "analyze", "sensitivity", *dense(), *images, *size)
        counted = {"batch": batch, "images": result["images"], "probes": result["probes"]}
        rows += [counted | numbers(row) for row in read(folder / "sensitivity.csv")]
    keep("sensitivity", rows)


def attention(out: Path, pruned: Path) -> None:
    prune(pruned)
    snapshots = [str(pruned / f"target-{target}") for target in ("0.65", "0.5")]
    flags = data_flags(data_folder())
    images = [f for f in flags[flags.index("--eval-data") :] if f not in ("--device", "cpu")]
    result = found(out / "attention", "analyze", "attention", *dense(), *snapshots, *images, "--samples", "64")
    keep(
        "attention", [{"images": result["images"]} | numbers(row) for row in read(out / "attention" / "attention.csv")]
    )


def shot(out: Path, pruned: Path) -> None:
    if not all((out / "fisher" / f"target-{target}").exists() for target in TARGETS):
        data = ["--data", str(data_folder() / "imagenet_sample1000" / "val")]
        found(out / "fisher", "prune", *dense(), *data, *FISHER)


def widths(out: Path, pruned: Path) -> None:
    prune(pruned)
    shot(out, pruned)
    rows, slopes = [], []
    for run in (pruned, out / "fisher"):
        folder = out / f"widths_{run.name}"
        result = found(folder, "analyze", "widths", str(run))
        rows += [{"run": run.name} | numbers(row) for row in read(folder / "widths.csv")]
        slopes += [{"run": run.name} | row for row in result["slopes"]]
    keep("widths", rows)
    if slopes:
        keep("slopes", slopes)


def rule(out: Path, pruned: Path) -> None:
    prune(pruned)
    shot(out, pruned)
    rows = []
    for run in (pruned, out / "fisher"):
        result = found(out / f"rule_{run.name}", "analyze", "rule", str(run))
        fitted = result["rule"]
        first, end = fitted["middle"]
        fits = {key: fitted[key] for key in ("heads", "qk_dim", "mlp", "v_dim", "factor")}
        rows.append(
            {"run": run.name, "snapshots": len(result["models"]), "first": first + 1, "last": end}
            | fits
            | {f"{key}_r2": value for key, value in result["r2"].items()}
        )
    keep("rule", rows)


def latency(out: Path, pruned: Path) -> None:
    prune(pruned)
    quick = ["--latency-batch", "2", "--latency-seconds", "6", "--count", "12", "--seconds", "9"]
    given = ["--latency-batch", "16", "--table", str(pruned / "latency_table.json"), "--count", "6", "--seconds", "6"]
    rows = []
    for seconds, size in ((6, quick), (20, given)):
        folder = out / f"latency_{seconds}"
        result = found(folder, "analyze", "latency", *dense(), *size)
        measured = {"table_seconds": seconds, "batch": result["latency_batch"]}
        rows += [measured | numbers(row) for row in read(folder / "latency.csv")]
    keep("latency", rows)


STEPS: dict[str, Callable[[Path, Path], None]] = {
    "sensitivity": sensitivity,
    "attention": attention,
    "shot": shot,
    "widths": widths,
    "rule": rule,
    "latency": latency,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/analyses"), help="folder of the runs")
    parser.add_argument("--pruned", type=Path, default=Path("runs/transfer/pruned"), help="made if it is not there")
    given = parser.parse_args()
    if unknown := set(given.steps).difference(STEPS):
        parser.error(f"unknown steps {sorted(unknown)}; there are {', '.join(STEPS)}")
    torch.set_num_threads(1)
    for step in given.steps or STEPS:
        STEPS[step](given.out, given.pruned)
    return 0


if __name__ == "__main__":
    sys.exit(main())
