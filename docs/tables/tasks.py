"""Other images, other heads: CIFAR-10 and CamVid, dense and pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from docs.tables.base import Row, rows, table

MODELS = {
    "target 1": "dense",
    "target 0.65": "pruned to 0.65 before",
    "target 0.5": "pruned to 0.5 before",
    "target 0.65, halfway": "pruned to 0.65 with its head halfway through them",
    "target 0.65, as a segmenter": "pruned to 0.65 with its head after them, then trained as long again",
}


def _by_model(found: Sequence[Row], metric: str, others: Sequence[str] = ()) -> list[list[str]]:
    """A line per model: GMACs, latency of the dense one's, what else was asked for, the metric's mean over seeds and
    each of them."""
    lines = []
    for case, words in MODELS.items():
        if mine := [r for r in found if r["case"] == case]:
            values = [float(r[metric]) for r in mine]
            latency = sum(float(r["measured_ratio"]) for r in mine) / len(mine)
            each = ", ".join(f"{v:.1f}" for v in values)
            asked = [f"{float(mine[0][key]):.1f}" for key in others]
            macs = f"{float(mine[0]['macs']) / 1e9:.3f}"
            lines.append([words, macs, f"{latency:.2f}", *asked, f"{sum(values) / len(values):.1f} ({each})"])
    return lines


def transfer() -> str:
    head = ["DeiT-Ti", "GMACs", "latency", "ImageNet top-1 before", "CIFAR-10 top-1 (seeds)"]
    return table(head, _by_model(rows("transfer_cpu"), "top1", ["imagenet_top1"]))


def camvid() -> str:
    return table(["DeiT-Ti", "GMACs", "latency", "mIoU (seeds)"], _by_model(rows("camvid_cpu"), "miou"))


TABLES: dict[str, Callable[[], str]] = {"transfer": transfer, "camvid": camvid}
