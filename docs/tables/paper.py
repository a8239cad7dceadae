"""The paper's numbers, quoted, beside ours (docs/paper.md)."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

from benchmarks.accuracy.ablation_arms import ARMS, difference
from docs.tables.base import rows, table

FAMILY = {
    "B": ("34 M", "6.8 G", "1.86 ×", "1.75 ×", "83.29"),
    "H": ("30 M", "6.2 G", "2.01 ×", "1.89 ×", "82.95"),
    "S": ("21 M", "4.2 G", "2.52 ×", "2.35 ×", "82.19"),
    "T": ("6.9 M", "1.3 G", "4.97 ×", "4.55 ×", "76.21"),
}
"""Tab. 1: parameters, FLOPs, speed-up over DeiT-B on a V100 and an RTX 3080, top-1."""
REVIT = {"small": ("23 M", "4.7 G", "2.31 ×", "81.22"), "tiny": ("5.9 M", "1.3 G", "4.75 ×", "74.20")}
"""Tab. 7: parameters, FLOPs, speed-up over DeiT-B, top-1."""


ABLATIONS = {
    "B.1": (
        "objective",
        "objectives are compared; full-model distillation is kept",
        "`--distill-weight 0`, `--cnn-teacher NAME`",
    ),
    "B.3": ("alignment", "head alignment: up to +0.3 points at the same latency", "in the benchmark alone"),
    "B.4": ("saliency", "magnitude cannot rank globally: groups stay whole or are emptied", "`--criterion magnitude`"),
    "B.6": ("latency", "the latency term meets the target sooner, with more accuracy", "`--latency-weight 0`"),
}
"""By section of the appendix: the table of `benchmarks.accuracy.ablations`, what the main text says of it, the flag."""
NOT_YET = "not measured yet; the command is prepared"


def family() -> str:
    """Tab. 1: the published models, and what their widths give on one H200 with random weights."""
    ours = {r["case"]: r for r in rows("nvidia_h200_pruned_deit")}
    lines = []
    for name, quoted in FAMILY.items():
        r = ours[name]
        mine = [f"{float(r['parameters']) / 1e6:.1f} M", f"{float(r['speed_up']):.2f} ×", "not run"]
        lines.append([f"NViT-{name}", *quoted, *mine])
    head = ["", *(f"*quoted:* {what}" for what in ("params", "FLOPs", "V100", "RTX 3080", "top-1"))]
    return table([*head, "ours: params", "H200, bf16, batch 256", "top-1"], lines)


def revit() -> str:
    """Tab. 7: ReViT of the published widths, counted."""
    import timm

    from nvit import zoo  # noqa: F401  (gives its models names in timm)
    from nvit.analysis.compare import size

    lines = []
    for name, quoted in REVIT.items():
        found = size(timm.create_model(f"revit_{name}_distilled_patch16_224").eval())
        mine = [f"{found['params'] / 1e6:.2f} M", f"{found['macs'] / 1e9:.2f} G", "not run"]
        lines.append([f"ReViT-{name[0].upper()}", *quoted, *mine])
    head = ["", *(f"*quoted:* {what}" for what in ("params", "FLOPs", "speed-up", "top-1"))]
    return table([*head, "ours: params", "MACs", "top-1"], lines)


def transfer() -> str:
    """Tab. 4: what a pruned model loses on other images. Theirs is another question: at equal latency."""
    lines = [
        ["CIFAR-10, top-1", "DeiT-S 98.52, NViT-S 98.78", *_ours("transfer_cpu", "top1", "target 0.65")],
        ["segmentation, mIoU", "Cityscapes: DeiT-S 71.89, NViT-S 73.22", *_ours("camvid_cpu", "miou", "target 0.65")],
    ]
    return table(["", "*quoted*", "ours: DeiT-Ti", "pruned to 0.65 before"], lines)


def _ours(name: str, metric: str, case: str) -> list[str]:
    found = rows(name)
    return [f"{mean(float(r[metric]) for r in found if r['case'] == which):.1f}" for which in ("target 1", case)]


def ablations() -> str:
    """App. B: what is quoted, and of each arm that was measured the points over ours with their interval."""
    found, lines = rows("ablations_cpu"), []
    for section, (name, quoted, flag) in ABLATIONS.items():
        arms = [row for arm in ARMS if arm.table == name for row in arm.rows]
        known = {arm: difference(found, arm) for arm in arms if any(r["arm"] == arm for r in found)}
        seen = [f"{a}: {100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})" for a, d in known.items() if d]
        lines.append([section, quoted, flag, "; ".join(seen) or NOT_YET])
    return table(["", "the paper (*quoted*)", "flag", "here: points over ours"], lines)


TABLES: dict[str, Callable[[], str]] = {"family": family, "transfer": transfer, "revit": revit, "ablations": ablations}
