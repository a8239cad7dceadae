"""From prunable layers to groups, and from cut weights back to layers: what all adapters share.

An adapter says which widths a model has (`Width`), gives its layers axes that name them, and lists the slices of the
parameters that no prunable layer holds (embeddings). The rest is declared by the layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..layers import EmbeddingNorm, Layout, Norm, Prunable, prunable_layers
from ..spec import Group, Slice

EMB = {"emb": "emb"}
"""Axes of a layer that is on the only residual stream of a model and on nothing else."""

PUBLISHED_HEAD_DIVISOR, PUBLISHED_DIM_DIVISOR = 12.0, 2.0


@dataclass(frozen=True)
class Width:
    """A prunable width: its group's name, its kind, and the blocks whose width it is."""

    name: str
    kind: str
    blocks: tuple[int, ...]

    @property
    def divisor(self) -> float:
        dims = {"heads": PUBLISHED_HEAD_DIVISOR, "qk_dim": PUBLISHED_DIM_DIVISOR, "v_dim": PUBLISHED_DIM_DIVISOR}
        return float(len(self.blocks)) if self.kind == "emb" else dims.get(self.kind, 1.0)


def block_axes(block: str, emb: str = "emb") -> tuple[dict[str, str], dict[str, str]]:
    """Axes of the attention and of the MLP of the block called `block`, on the stream `emb`."""
    attention = {kind: f"{block}.{kind}" for kind in ("heads", "qk_dim", "v_dim")}
    return {"emb": emb} | attention, {"emb": emb, "mlp": f"{block}.mlp"}


def block_widths(block: str, index: int) -> list[Width]:
    """The four widths of the block called `block`."""
    return [Width(f"{block}.{kind}", kind, (index,)) for kind in ("heads", "qk_dim", "v_dim", "mlp")]


def with_axes(axes: Mapping[str, str], layer: Prunable, host: nn.Module) -> Prunable:
    """The layer with these axes, and those inside it with theirs, in the mode of the host layer it replaces."""
    for inner in (layer, *(m for m in layer.modules() if isinstance(m, Prunable) and m is not layer)):
        inner.axes = dict(axes) if inner is layer else {a: g for a, g in axes.items() if a in inner.layout.axes}
    return layer.train(host.training)


def norm(
    host: nn.Module,
    axes: Mapping[str, str],
    *,
    layout: Layout | None = None,
    embedding: bool = False,
    **more: bool | None,
) -> Norm:
    """The prunable form of a LayerNorm or RMSNorm of torch or timm.

    Args:
        embedding: it is part of the patch embedding, see `EmbeddingNorm`.
        more: as `Norm` takes them.
    """
    eps = host.eps if host.eps is not None else torch.finfo(host.weight.dtype).eps
    make = EmbeddingNorm if embedding else Norm
    layer = make(host.weight, getattr(host, "bias", None), eps, layout=layout, rms=is_rms(host), **more)
    return with_axes(axes, layer, host)


def is_rms(host: nn.Module) -> bool:
    """Whether a norm takes no mean off, by its class's name: torch and timm have several of either kind."""
    return host.rms if isinstance(host, Norm) else "rms" in type(host).__name__.lower()


def embedding_slices(model: nn.Module, axes: Mapping[str, int], published: Iterable[str] = ()) -> list[Slice]:
    """Slices along the stream of parameters outside prunable layers, those that the model has.

    Args:
        axes: parameter name -> the dimension that holds the stream's channels.
        published: names that the saliency of the published runs counts.
    """
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    chosen = set(published)
    return [Slice(n, shapes[n], d, published=n in chosen) for n, d in axes.items() if n in shapes]


def collect(
    model: nn.Module, widths: Sequence[Width], extra: Mapping[str, Sequence[Slice]], bundle_sizes: Mapping[str, int]
) -> list[Group]:
    """The groups of a prepared model, in the order of `widths`.

    Args:
        extra: by group, slices that no prunable layer declares.
    """
    slices = {w.name: list(extra.get(w.name, ())) for w in widths}
    spans = dict.fromkeys(slices, 1)
    for name, layer in prunable_layers(model).items():
        for axis, s in layer.slices():
            group = layer.axes[axis]
            slices[group].append(replace(s, name=f"{name}.{s.name}"))
            spans[group] = max(spans[group], layer.span(axis))
    groups = []
    for w in widths:
        size = slices[w.name][0].view[slices[w.name][0].axis]
        multiple = max(1, bundle_sizes[w.kind] // spans[w.name])
        groups.append(Group(w.name, w.kind, size, multiple, tuple(slices[w.name]), w.blocks, w.divisor))
    return groups


def fill_buffers_(module: nn.Module) -> None:
    """Give one of timm's modules that was built on the meta device its buffers on the CPU; parameters stay there."""
    params = dict(module.named_parameters(recurse=False))
    if any(b.is_meta for b in module.buffers()):
        module.to_empty(device="cpu").init_non_persistent_buffers()
        for name, p in params.items():
            setattr(module, name, nn.Parameter(p.to("meta"), requires_grad=p.requires_grad))


def resize_layers(model: nn.Module, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Give a prepared model these parameters and the widths that `masks` leaves, in place; masks and taps are gone
    afterwards, and buffers are where the parameters are."""
    modules = dict(model.named_modules())
    for name, tensor in params.items():
        owner, _, leaf = name.rpartition(".")
        trainable = getattr(modules[owner], leaf).requires_grad
        setattr(modules[owner], leaf, nn.Parameter(tensor.detach(), requires_grad=trainable))
        if isinstance(modules[owner], nn.Linear) and leaf == "weight":
            modules[owner].out_features, modules[owner].in_features = tensor.shape
    for layer in prunable_layers(model).values():
        layer.resize_({axis: masks[group] for axis, group in layer.axes.items()})
        layer.unwatch_()
    device = next(model.parameters()).device
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer is not None and buffer.device != device and device.type != "meta":
                setattr(module, name, buffer.to(device))
