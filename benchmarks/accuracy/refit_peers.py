"""Top-1 of DeiT-Ti pruned in one shot to equal MACs by Torch-Pruning 1.6 and by us, no training.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.refit_peers [mlp=0.722 …] [--images 256] [--eval-images 0]

By case and share of dense MACs. `mlp`: hidden MLP units alone. `all`: every structure. Torch-Pruning ranks all units
together by its Taylor or its magnitude importance, and for `all` also apart by structure (isomorphic pruning,
arXiv:2407.04616); its gradients are those of the same calibration images that we have, with their true labels. It keeps
at least the target's share of MACs, ours at most. Ours is criterion `remaining`, without and with a refit, labels
unread; its rows have the gain over Torch-Pruning's best at that point, with its 95 % interval (paired bootstrap over
images). Writes refit_peers_cpu.csv (rows that are there of other points stay) and, from it and refit_global_cpu.csv,
refit_cpu.png in benchmarks/results;
`--plot` draws without measuring. Needs `pip install torch-pruning`.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.accuracy.library import INPUT, MODEL, Bench, answers, data_folder
from benchmarks.accuracy.paired import paired_bootstrap
from benchmarks.engine.torch_pruning_vit import narrowed
from nvit.analysis.evaluate import macs
from nvit.selection.lagrangian import drop_to_target
from nvit.structure.masks import full_masks

POINTS = (("mlp", 0.722), ("all", 0.846), ("all", 0.65), ("mlp", 0.833), ("all", 0.8), ("all", 0.936))
CASES = ("dense", "mlp", "all")
TITLES = {"all": "all structures", "mlp": "hidden MLP units alone"}
LINES = {
    "ours, refitted": ("C0", "o"),
    "ours": ("C0", "^"),
    "Torch-Pruning, Taylor": ("C1", "s"),
    "Torch-Pruning, isomorphic Taylor": ("C3", "v"),
    "Torch-Pruning, magnitude": ("C2", "D"),
}
"""Methods in the order of the legend, with colour and marker."""


def with_gradients(checkpoint: str, batches) -> nn.Module:
    """timm's own DeiT-Ti, with the gradients of cross entropy at true labels, mean over batches of the same size."""
    model = timm.create_model(MODEL, checkpoint_path=checkpoint).eval()
    for x, y in batches:
        (F.cross_entropy(model(x), y) / len(batches)).backward()
    return model


def peers(case: str) -> dict[str, tuple]:
    """By method, Torch-Pruning's importance and options."""
    import torch_pruning as tp

    found = {
        "Torch-Pruning, Taylor": (tp.importance.GroupTaylorImportance(), {}),
        "Torch-Pruning, magnitude": (tp.importance.GroupMagnitudeImportance(p=2), {}),
    }
    if case == "all":
        found["Torch-Pruning, isomorphic Taylor"] = (tp.importance.GroupTaylorImportance(), {"isomorphic": True})
    return found


class PeerBench:
    def __init__(self, bench: Bench) -> None:
        self.bench, self.scores = bench, bench.remaining()
        self.timm = with_gradients(bench.checkpoint, bench.calibration)
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
        for method, (importance, options) in peers(case).items():
            model, _ = narrowed(self.timm, target, importance, mlp_only=case == "mlp", input_size=INPUT, **options)
            theirs.append(self.measure(model, method=method, **row))
        best = max(theirs, key=lambda right: float(right.sum()))
        kinds = {g.name: g.kind for g in b.groups}
        scores = {n: s for n, s in self.scores.items() if case == "all" or kinds[n] == "mlp"}
        masks, _ = drop_to_target(scores, full_masks(b.groups), b.groups, b.table, target * b.table.dense_ms)
        for refit in (False, True):
            small = b.pruned(masks, refit=refit)
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


def points(results: Path) -> dict[tuple[str, str], dict[float, float]]:
    """Top-1 by share of MACs, by case and method; the dense model belongs to all."""
    rows = _read(results / "refit_peers_cpu.csv")
    dense = next(float(r["top1"]) for r in rows if r["case"] == "dense")
    rows += [
        r | {"case": "all", "method": "ours, refitted" if r["refit"] == "True" else "ours"}
        for r in _read(results / "refit_global_cpu.csv")
        if r["case"] == "global" and r["criterion"] == "remaining"
    ]
    found: dict[tuple[str, str], dict[float, float]] = {}
    for r in rows:
        if r["case"] != "dense":
            found.setdefault((r["case"], r["method"]), {1.0: dense})[float(r["macs"])] = float(r["top1"])
    return found


def plot(results: Path) -> Path:
    """Top-1 against the share of MACs, a panel a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found, path = points(results), results / "refit_cpu.png"
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axes, (case, title) in zip(panels, TITLES.items(), strict=True):
        for method, (colour, marker) in LINES.items():
            line = sorted(found.get((case, method), {}).items())
            if line:
                style = "--" if method == "ours" else "-"
                axes.plot(*zip(*line, strict=True), style, color=colour, marker=marker, markersize=5, label=method)
        axes.set(xlabel="share of dense MACs", title=title)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1 %, 1300 ImageNet images")
    panels[0].set_ylim(bottom=0)
    panels[0].legend(loc="lower right", fontsize=8)
    figure.suptitle("DeiT-Ti pruned in one shot, no training")
    figure.savefig(path, dpi=150)
    plt.close(figure)
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
