"""Top-1 of DeiT-Ti pruned in one shot to equal MACs by Torch-Pruning 1.6 and by us, no training.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.refit_peers [mlp=0.722 …] [--images 256] [--eval-images 0]

By case and share of dense MACs. `mlp`: hidden MLP units alone. `all`: every structure. Torch-Pruning ranks all units
together by its Taylor or its magnitude importance, and for `all` also apart by structure (isomorphic pruning,
arXiv:2407.04616); its gradients are those of the same calibration images that we have, with their true labels. It keeps
at least the target's share of MACs, ours at most. Ours is criterion `remaining`, without and with a refit, labels
unread; its rows have the gain over Torch-Pruning's best at that point, with its 95 % interval (paired bootstrap over
images). Writes refit_peers_cpu.csv (rows that are there of other points stay) and, from it, refit_global_cpu.csv and
refit_latency_cpu.csv (`benchmarks.accuracy.refit_latency`), refit_cpu.png in benchmarks/results; `--plot` draws without
measuring. Needs `pip install torch-pruning`.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.accuracy.library import INPUT, Bench, answers, data_folder
from benchmarks.accuracy.paired import paired_bootstrap
from benchmarks.accuracy.peers import POINTS, Peers
from nvit.analysis.accuracy_curve import Against, plot_accuracy
from nvit.analysis.evaluate import macs
from nvit.analysis.figure import PIXELS

CASES = ("dense", "mlp", "all")
LATENCY = ("latency", "latency_low", "latency_high")
TITLES = {"all": "all structures", "mlp": "hidden MLP units alone"}
METHODS = (
    "ours, refitted",
    "ours",
    "Torch-Pruning, Taylor",
    "Torch-Pruning, isomorphic Taylor",
    "Torch-Pruning, magnitude",
)
"""In the order of the legend."""
IMAGES = 1300
"""That top-1 is of."""


class PeerBench(Peers):
    """Accuracy of all methods at a point."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.dense_macs = macs(self.timm, INPUT)
        x, _ = bench.evaluation[0]
        with torch.no_grad():
            assert torch.allclose(self.timm(x), bench.plain(x), rtol=0, atol=1e-3), "the dense models differ"
        self.records = harness.Records("refit_peers")
        self.records.add(case="dense", macs=1.0, top1=100 * float(bench.dense.mean()))

    def measure(self, model: nn.Module, *, over: Tensor | None = None, **row) -> Tensor:
        """Adds a row; right or wrong by image."""
        right = answers(model.eval(), self.bench.evaluation)
        more = {}
        if over is not None:
            d = paired_bootstrap(right.tolist(), over.tolist())
            more = {"gain": 100 * d.mean, "low": 100 * d.low, "high": 100 * d.high}
        images = sum(len(x) for x, _ in self.bench.calibration)
        share = macs(model, INPUT) / self.dense_macs
        self.records.add(**row, macs=share, top1=100 * float(right.mean()), images=images, **more)
        return right

    def at(self, case: str, target: float) -> None:
        """Rows of every method at one share of MACs."""
        b, row = self.bench, {"case": case, "target": target}
        theirs = []
        for method, model in self.theirs(case, target):
            theirs.append(self.measure(model, method=method, **row))
        best = max(theirs, key=lambda right: float(right.sum()))
        for refit in (False, True):
            small = b.pruned(self.masks(case, target), refit=refit)
            self.measure(small, over=best, method="ours, refitted" if refit else "ours", **row)
        self.save()

    def save(self) -> None:
        """Rows measured now, and those of other points that the file has."""
        now = list(self.records.rows)
        measured = {_key(r) for r in now}
        kept = [r for r in _read(self.records.path) if _key(r) not in measured]
        self.records.rows = sorted(kept + now, key=lambda r: (CASES.index(r["case"]), -_key(r)[1]))
        self.records.save()
        self.records.rows = now


def _key(row: Mapping) -> tuple[str, float]:
    return row["case"], float(row.get("target") or 1)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def points(results: Path) -> dict[str, list[dict]]:
    """Rows by method: `case`, `macs` as a share of dense, `top1`, and the measured share of latency with its range
    where refit_latency_cpu.csv has one; the dense model belongs to all."""
    rows = _read(results / "refit_peers_cpu.csv")
    dense = next(float(r["top1"]) for r in rows if r["case"] == "dense")
    rows += [
        r | {"case": "all", "method": "ours, refitted" if r["refit"] == "True" else "ours"}
        for r in _read(results / "refit_global_cpu.csv")
        if r["case"] == "global" and r["criterion"] == "remaining"
    ]
    timed = {(r["case"], r["method"], float(r["target"])): r for r in _read(results / "refit_latency_cpu.csv")}
    found: dict[str, dict] = {}
    for r in rows:
        if r["case"] == "dense":
            continue
        method, case = r["method"], r["case"]
        mine, macs = found.setdefault(method, {}), round(float(r["macs"]), 4)
        mine[case, 1.0] = {"case": case, "macs": 1.0, "top1": dense} | dict.fromkeys(LATENCY, 1.0)
        # A refit leaves the widths as they are.
        time = timed.get((case, method.removesuffix(", refitted"), float(r["target"])), {})
        latency = {key: float(time[key]) for key in LATENCY if key in time}
        mine[case, macs] = {"case": case, "macs": macs, "top1": float(r["top1"])} | latency
    return {method: list(found[method].values()) for method in METHODS if method in found}


def plot(results: Path, path: Path | None = None, pixels: int = PIXELS) -> Path:
    """Top-1 against the share of MACs and, where it was measured, of latency, a panel a case."""
    found, path = points(results), path or results / "refit_cpu.png"
    costs = [("macs", "share of dense MACs")]
    if any("latency" in r and r["macs"] < 1 for rows in found.values() for r in rows):
        costs.append(("latency", "measured share of dense latency"))
    against = [Against(key, label, title, case) for key, label in costs for case, title in TITLES.items()]
    plot_accuracy(found, against, path, images=IMAGES, title="DeiT-Ti pruned in one shot, no training", pixels=pixels)
    return path


def point(text: str) -> tuple[str, float]:
    case, _, share = text.partition("=")
    if case not in TITLES:
        raise argparse.ArgumentTypeError(f"{text!r} is no point; expected {' or '.join(f'{c}=SHARE' for c in TITLES)}")
    return case, float(share)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", nargs="*", type=point, help="CASE=SHARE; six by default")
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--eval-images", type=int, default=0, help="evaluation images; 0 for all")
    parser.add_argument("--plot", action="store_true", help="draw the figure from the CSV that is there")
    args = parser.parse_args()
    if not args.plot:
        root = data_folder()
        torch.set_num_threads(1)
        bench = PeerBench(Bench(root, args.images, args.eval_images))
        for case, target in args.points or POINTS:
            bench.at(case, target)
    print(plot(harness.RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
