"""Put fused layers into a timm model and take them out again; tell them what is kept; read their scores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nvit_kernels.hosts import layers


def fuse(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Swap each timm Attention, Mlp, SwiGLU, LayerNorm and Block in `model` for its fused layer, in place.

    Outputs stay equal, parameters are the same objects, and the state dict keeps its keys. What the kernels cannot
    compute (dropout on attention weights or hidden units, norms inside an MLP, other activations, classes derived from
    timm's) stays as it is.

    Args:
        model: a timm model, dense or pruned, or one of its blocks.
        masks: see `keep_`.

    Returns:
        `model`, or the fused layer in its place when it is itself one that is swapped.
    """
    if isinstance(model, layers.Fused):
        return model
    for name, child in list(model.named_children()):
        setattr(model, name, fuse(child))
    made = _fused(model)
    if masks is not None:
        keep_(made, masks)
    return made


def unfuse(model: nn.Module) -> nn.Module:
    """The inverse of `fuse`: timm's own modules again, with whatever their parameters now are."""
    for name, child in list(model.named_children()):
        setattr(model, name, unfuse(child))
    if not isinstance(model, layers.Fused):
        return model
    host = model.host
    for name, child in model.named_children():
        setattr(host, name, child)
    for name, parameter in model.named_parameters(recurse=False):
        setattr(host, name, parameter)
    host.training = model.training
    return host


def fused_layers(model: nn.Module) -> dict[str, layers.Fused]:
    """The fused layers in `model` by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, layers.Fused)}


def keep_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Restrict a fused model to kept units. Calling it again with other masks recompiles and re-allocates nothing.

    Args:
        masks: bool vectors by group: `emb` for all norms of the stream, `blocks.0.heads`, `blocks.0.qk_dim`,
            `blocks.0.v_dim`, `blocks.0.mlp` by block. A group without a mask stays as it is.

    Raises:
        ValueError: a mask has another width than its layers, or names no group of this model.
    """
    places = groups(model)
    if unknown := [name for name in masks if name not in places]:
        raise ValueError(f"no group {unknown[0]} in this model; it has {', '.join(places) or 'no fused layers'}")
    for name, mask in masks.items():
        for layer, kind in places[name]:
            layer.keep_(kind, mask)


def groups(model: nn.Module) -> dict[str, list[tuple[layers.Fused, str]]]:
    """Group name -> the layers that hold it, each with its kind of width there."""
    places: dict[str, list[tuple[layers.Fused, str]]] = {}
    for name, layer in fused_layers(model).items():
        for kind in layer.widths:
            block = name.rpartition(".")[0]
            group = kind if kind == "emb" or not block else f"{block}.{kind}"
            places.setdefault(group, []).append((layer, kind))
    return places


def collect_scores_(model: nn.Module, batch: int) -> dict[str, Tensor]:
    """Have every backward of a fused model add per-sample scores to the buffers returned, float32 `(batch, units)`.

    A score is Σ value · ∂value at the place where the unit leaves the network; norms that read one stream add to one
    `emb` buffer. Square it (per batch, or per sample) for a saliency. `collect_scores_(model, 0)` ends it.
    """
    buffers = {}
    for name, places in groups(model).items():
        layer, kind = places[0]
        device = next(layer.parameters()).device
        buffers[name] = torch.zeros(batch, layer.widths[kind], device=device)
        for layer, kind in places:
            layer.scores.pop(kind, None)
            if batch:
                layer.scores[kind] = buffers[name]
    return buffers if batch else {}


def _fused(module: nn.Module) -> nn.Module:
    """The fused layer for `module`, whose children are fused already, or `module` itself."""
    if layers.is_layer_norm(module):
        return layers.LayerNorm(module)
    kind = type(module)
    if not kind.__module__.startswith("timm."):
        return module
    from timm.layers import Attention, GluMlp, Mlp, SwiGLU
    from timm.models.vision_transformer import Block

    if kind is Block:
        return layers.Block(module)
    if kind is Attention and _passes(module.attn_drop, module.norm) and getattr(module, "gate", None) is None:
        return layers.Attention(module)
    if kind is Mlp and _linear(module) and type(module.act) is nn.GELU and module.act.approximate == "none":
        return layers.Mlp(module)
    packed = kind is GluMlp and not module.gate_last
    if (kind is SwiGLU or packed) and _linear(module) and type(module.act) is nn.SiLU:
        return layers.SwiGLU(module)
    return module


def _linear(mlp: nn.Module) -> bool:
    return isinstance(mlp.fc2, nn.Linear) and _passes(mlp.drop1, mlp.norm)


def _passes(*modules: nn.Module) -> bool:
    """Whether modules change nothing in any mode."""
    return all(isinstance(m, nn.Identity) or (isinstance(m, nn.Dropout) and m.p == 0) for m in modules)
