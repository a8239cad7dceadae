"""One adapter per model family: which weights leave together, declared rather than traced.

An adapter is a module with these functions; nothing outside `adapters/` knows a host's attribute names.

| function | does |
|---|---|
| `refusal(model)` | why this model is not supported, or None; `model class NAME` alone where the class is not its own |
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

from torch import Tensor, nn

from . import hf_vit, timm_vit

FAMILIES: dict[str, ModuleType] = {"timm_vit": timm_vit, "hf_vit": hf_vit}


def find(model: nn.Module) -> ModuleType:
    """The adapter for `model`.

    Raises:
        ValueError: no adapter takes it; names the reason and the supported families.
    """
    reasons = []
    for adapter in FAMILIES.values():
        reason = adapter.refusal(model)
        if reason is None:
            return adapter
        reasons.append(reason)
    raise ValueError(
        f"{type(model).__name__} is not supported ({_why(model, reasons)}). Supported families: timm's "
        "VisionTransformer and VisionTransformerDistilled (ViT, DeiT, DeiT-III, AugReg, DINO, DINOv2 and alike); "
        "Hugging Face's ViT, DeiT and DINOv2 for image classification; docs/models.md lists them."
    )


def refusal(model: nn.Module) -> str | None:
    """Why no adapter takes `model`, or None."""
    reasons = [adapter.refusal(model) for adapter in FAMILIES.values()]
    return None if None in reasons else _why(model, reasons)


def _why(model: nn.Module, reasons: list[str]) -> str:
    """The reasons of the adapters that know the model's class; of all of them where none does."""
    unknown = f"model class {type(model).__name__}"
    return "; ".join(r for r in reasons if r != unknown) or unknown


def preprocess(model: nn.Module) -> dict[str, Any]:
    """How images are prepared for a model of a supported family: timm's data config, at the model's own size."""
    return find(model).preprocess(model)


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits `(batch, classes)` of any classifier, also one that hands them out in an object, as transformers' do."""
    out = model(images)
    return out if isinstance(out, Tensor) else out.logits


def classes(model: nn.Module) -> int:
    """How many classes a model tells apart, under timm's name for it or transformers'."""
    return model.num_classes if hasattr(model, "num_classes") else model.num_labels
