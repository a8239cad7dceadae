"""One adapter per model family: which weights leave together, declared rather than traced.

An adapter is a module with these functions; nothing outside `adapters/` knows a host's attribute names.

| function | does |
|---|---|
| `refusal(model)` | why this model is not supported, or None |
| `prepare(model)` | swaps in prunable layers, in place; same outputs, same parameter names |
| `groups(model, bundle_sizes)` | the prunable widths and their slices |
| `spec(model, blocks)` | the `ViTSpec` of the model with these block widths |
| `build(spec, device)` | the prepared dense model, a skeleton on the meta device unless told otherwise |
| `resize(model, params, masks)` | gives a prepared model cut parameters and the widths that masks leave, in place |
| `logits(model, images)` | `(class token's, distillation token's or None)` in any mode |
| `preprocess(model)` | input size, mean, std, crop: how images are prepared for it |
| `tokens(model)` | tokens in the residual stream |
| `part(model, name)` | one part of a one-block model as a function, for the latency table |
| `mlp_projections(model)` | matrices of hidden × stream width in an MLP |
| `rest_macs_per_channel(model)` | multiply-accumulates outside the blocks, per channel of the stream |
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import nn

from . import timm_vit

FAMILIES: dict[str, ModuleType] = {"timm_vit": timm_vit}


def find(model: nn.Module) -> ModuleType:
    """The adapter for `model`.

    Raises:
        ValueError: no adapter takes it; names the reason and the supported families.
    """
    reasons = {name: adapter.refusal(model) for name, adapter in FAMILIES.items()}
    for name, reason in reasons.items():
        if reason is None:
            return FAMILIES[name]
    reason = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(
        f"{type(model).__name__} is not supported ({reason}). Supported families: timm's VisionTransformer and "
        "VisionTransformerDistilled (ViT, DeiT, DeiT-III, AugReg, DINO, DINOv2 and alike); docs/models.md lists them."
    )


def preprocess(model: nn.Module) -> dict[str, Any]:
    """How images are prepared for a model of a supported family: timm's data config, at the model's own size."""
    return find(model).preprocess(model)
