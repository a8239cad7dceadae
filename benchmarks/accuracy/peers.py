"""Models of DeiT-Ti at equal MACs: Torch-Pruning 1.6's by its importances, and what we keep there."""

from __future__ import annotations

from collections.abc import Iterator

import timm
import torch.nn.functional as F
from torch import nn

from benchmarks.accuracy.library import INPUT, MODEL, Bench
from benchmarks.engine.torch_pruning_vit import narrowed
from nvit.selection.lagrangian import drop_to_target
from nvit.structure.masks import Masks, full_masks

POINTS = (("mlp", 0.722), ("all", 0.846), ("all", 0.65), ("mlp", 0.833), ("all", 0.8), ("all", 0.936))
"""Case and share of dense MACs."""


def with_gradients(checkpoint: str, batches, name: str = MODEL) -> nn.Module:
    """timm's own model, with the gradients of cross entropy at true labels, mean over batches of the same size."""
    model = timm.create_model(name, checkpoint_path=checkpoint).eval()
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


class Peers:
    """What every method makes of one dense model and the same calibration images."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.scores = bench, bench.remaining()
        self.timm = with_gradients(bench.checkpoint, bench.calibration)

    def theirs(self, case: str, target: float) -> Iterator[tuple[str, nn.Module]]:
        """Torch-Pruning's models at one share of MACs, by method."""
        for method, (importance, options) in peers(case).items():
            narrow, _ = narrowed(self.timm, target, importance, mlp_only=case == "mlp", input_size=INPUT, **options)
            yield method, narrow

    def masks(self, case: str, target: float) -> Masks:
        """What we keep there."""
        b, kinds = self.bench, {g.name: g.kind for g in self.bench.groups}
        scores = {n: s for n, s in self.scores.items() if case == "all" or kinds[n] == "mlp"}
        return drop_to_target(scores, full_masks(b.groups), b.groups, b.table, target * b.table.dense_ms)[0]
