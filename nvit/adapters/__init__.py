"""One adapter per model family: which weights leave together, declared rather than traced.

An adapter is a module with these functions; nothing outside `adapters/` knows a host's attribute names. All but the
first three and `preprocess` get prepared models, dense or compact. `prepare` and `resize` return the model; a prepared
one goes through `prepare` unchanged. `groups` takes `spec.BUNDLE_SIZES` where none are given, and `preprocess` always
holds an `input_size`. `build` raises ValueError for a spec it does not know.

| function | does |
|---|---|
| `knows(model)` | whether the model is of this family at all |
| `refusal(model)` | why a model of this family, prepared or not, is not supported, or None |
| `prepare(model)` | swaps in prunable layers, in place; same outputs, same parameter names |
| `groups(model, bundle_sizes)` | the prunable widths and their slices |
| `spec(model, blocks)` | the `ViTSpec` of the model with these block widths |
| `build(spec, device)` | the prepared dense model, a skeleton on the meta device unless told otherwise |
| `resize(model, params, masks)` | gives it cut parameters and the widths that masks leave, in place |
| `logits(model, images)` | `(class token's, distillation token's or None)`, each `(batch, classes)` |
| `preprocess(model)` | how images are prepared for it, as timm's data config; `input_size` is always there |
| `tokens(model)` | tokens in the residual stream |
| `parts(model)` | the `Part`s whose latencies add up to a prepared model's |
| `part_macs(model, part)` | a function of a part's widths: multiply-accumulates an image of one piece, multilinear |
| `sample_spec(spec, part, widths)` | the spec of the smallest model that holds one piece of `part` at these widths |
| `piece(model, part)` | that piece of such a model as a function, and the shape of its input without the batch |
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..layers.bypass import carried
from . import hf_vit, timm_beit, timm_eva, timm_swin, timm_vit
from .masking import hook_refusal

FAMILIES: dict[str, ModuleType] = {
    "timm_vit": timm_vit,
    "timm_swin": timm_swin,
    "timm_eva": timm_eva,
    "timm_beit": timm_beit,
    "hf_vit": hf_vit,
}

SUPPORTED = (
    "timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP, SigLIP and alike), SwinTransformer, Eva (EVA02, DINOv3, PE and "
    "alike) and Beit; Hugging Face's ViT, DeiT and DINOv2 for image classification; docs/models.md lists them."
)


def refusal(model: nn.Module) -> str | None:
    """Why no adapter takes `model`, or None."""
    family = next((a for a in FAMILIES.values() if a.knows(model)), None)
    return "no adapter knows its class" if family is None else family.refusal(model)


def find(model: nn.Module) -> ModuleType:
    """The adapter for `model`.

    Raises:
        ValueError: no adapter takes it; names the reason and the supported families.
    """
    if (reason := refusal(model)) is not None:
        raise ValueError(f"{type(model).__name__} is not supported: {reason}. Supported families: {SUPPORTED}")
    return next(a for a in FAMILIES.values() if a.knows(model))


def find_maskable(model: nn.Module) -> ModuleType:
    """The adapter for a model that is going to be masked.

    Raises:
        ValueError: as `find`; or masks would bypass something in it, an adapter, a hook, a parametrised or quantised
            weight, which is named. The model is left as it was.
    """
    host = next((m for m in model.modules() if any(a.knows(m) for a in FAMILIES.values())), None)
    if (reason := None if host is None else carried(host)) is None:
        family = find(model)
        reason = hook_refusal(model, family.prepare)
    if reason is not None:
        raise ValueError(reason)
    return family


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
