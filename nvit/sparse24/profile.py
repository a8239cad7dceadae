"""How much the rows that a layer reads count: by the energy of Gauss-Newton gradients there. No labels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import adapters, tasks
from ..calibration.capture import Place, capture
from ..calibration.gauss_newton import Probes
from ..layers import prunable_layers
from ..refit.entries import refittable
from ..tasks import Task
from ..utils.devices import sent


def row_profiles(
    model: nn.Module, batches: Iterable[Tensor], seed: int = 0, *, task: Task | None = None
) -> dict[Place, Tensor]:
    """Σ |g|² by row of an image `(rows per image,)` at the places that the blocks' linear layers read, g the gradient
    that a probe of the logits causes.

    Weights get no gradient; the model is left as it was.

    Args:
        task: whose probes are sent backward; the one that the model tells if None.

    Raises:
        FloatingPointError: a logit is not finite.
    """
    layers, task = prunable_layers(model), task or tasks.of("auto", model)
    places = [(name, site) for name, layer in layers.items() if refittable(layer) for site in ("in", "out")]
    profiles: dict[Place, Tensor] = {}
    wanted = {p: p.requires_grad for p in model.parameters()}
    device = next(model.parameters()).device
    probes, images = Probes(task, device, seed), 0

    def sink(place: Place, _, gradient: Tensor) -> None:
        rows = layers[place[0]].sites()[place[1]].rows(gradient).float()
        energy = rows.square().sum(1).view(images, -1).sum(0, dtype=torch.float64)
        profiles[place] = profiles.get(place, 0.0) + energy

    try:
        model.requires_grad_(False)
        with capture(model, places, sink), torch.enable_grad():
            for x in batches:
                images = len(x)
                probes.send(adapters.find(model).logits(model, sent(x, device)).mean)
        probes.check()
    finally:
        for p, was in wanted.items():
            p.requires_grad_(was)
    return profiles
