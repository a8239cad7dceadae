"""2:4 sparsity of a compact model's projections (the paper's Sec. 3.2.3): masks, channel order, sparse tensors on GPUs.

Weights keep their dense shape with zeros where the mask is not, so that a snapshot runs anywhere. On a GPU with sparse
tensor cores `accelerate_` replaces them by compressed ones, layer by layer, where that was measured to be faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import adapters
from .latency.clock import time_each
from .layers import Prunable, prunable_layers
from .structure import snapshot
from .utils.progress import Progress, silent

MULTIPLE = 16
"""Both sides of a projection must be multiples of this for any sparse backend."""

CUTLASS, CUSPARSELT, MASKED, DENSE = "CUTLASS", "cuSPARSELt", "masked", "dense"


def native() -> dict[str, str]:
    """Whether the compiled library's halves are loaded, or why not."""
    from nvit_kernels import _native

    found = _native.load()
    return {"CPU": "there" if found.cpu else found.why_not_cpu, "CUDA": "there" if found.cuda else found.why_not_cuda}


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear projection of the blocks of a prepared model, by the name of its weight."""
    return {
        f"{name}.{part.name}.weight": part.module
        for name, layer in prunable_layers(model).items()
        if layer.reorderable() is not None
        for part in layer.linears()
    }


def refusal(weight: Tensor) -> str | None:
    """Why no sparse backend takes a weight of this shape, or None."""
    if any(n % MULTIPLE for n in weight.shape):
        return f"shape {tuple(weight.shape)} is not in multiples of {MULTIPLE}"
    return None


def masks_2to4(model: nn.Module) -> dict[str, Tensor]:
    """The two largest of each four neighbours along the input, for every projection that a backend takes.

    Returns:
        Bool masks of the weights' shapes, by weight name.
    """
    from nvit_kernels.sparse24 import mask_2to4

    return {n: mask_2to4(p.weight.detach()) for n, p in projections(model).items() if refusal(p.weight) is None}


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero what the masks leave out, in place."""
    found = projections(model)
    for name, mask in masks.items():
        found[name].weight.mul_(mask)


def _reorder_(layer: Prunable, axis: str, order: Tensor) -> None:
    """Reorder the units of `mlp`, or the dims of `v_dim` head by head, wherever the layer's parameters hold them."""
    for inner in prunable_layers(layer).values():
        params = dict(inner.named_parameters())
        for mine, s in inner.slices():
            if mine == axis:
                part = s.of(params[s.name])
                first = s.axis - (axis == "v_dim")  # the head stands before its dim
                part.copy_(part.flatten(first, s.axis).index_select(first, order).view(part.shape))


@torch.no_grad()
def permute_(model: nn.Module, seconds: float = 60.0, progress: Progress = silent) -> list[dict[str, float | str]]:
    """Reorder MLP hidden units, and V dims inside each head, so that 2:4 keeps more magnitude. The function of the
    model is unchanged.

    Args:
        seconds: bound on the time for all layers together.

    Returns:
        A row per reader: `weight, kept_before, kept_after` (fractions of the sum of magnitudes).
    """
    from nvit_kernels.sparse24.permute import search_channel_order

    layers = {n: m for n, m in prunable_layers(model).items() if m.reorderable() is not None}
    rows = []
    for done, (name, layer) in enumerate(layers.items(), start=1):
        part, axis, span = layer.reorderable()
        reader = part.module
        if reader.in_features % 4 or (span or 4) % 4:
            continue
        found = search_channel_order(reader.weight.detach().cpu(), span=span, seconds=seconds / len(layers))
        _reorder_(layer, axis, found.order.to(reader.weight.device))
        kept = {"kept_before": found.kept_before, "kept_after": found.kept_after}
        rows.append({"weight": f"{name}.{part.name}.weight"} | kept)
        progress(done, len(layers), f"permute: {name} keeps {found.kept_after:.4f} of its magnitude")
    return rows


@dataclass(frozen=True)
class Choice:
    """How one projection runs on this device.

    Attributes:
        backend: `CUTLASS` or `cuSPARSELt`; `masked`, a dense weight with zeros, where there are no sparse tensor cores;
            `dense`, no mask at all.
        why: one phrase.
        dense_ms, sparse_ms: measured, None where nothing was.
    """

    weight: str
    backend: str
    why: str
    dense_ms: float | None = None
    sparse_ms: float | None = None

    @property
    def masked(self) -> bool:
        """Whether 2:4 is worth having here: a backend is faster, or nothing could be measured that says otherwise."""
        return self.backend != DENSE


def backends(device: torch.device, dtype: torch.dtype) -> tuple[tuple[str, ...], str]:
    """Sparse backends this device can run at this dtype, and why there are none or which they are."""
    if device.type != "cuda":
        return (), f"no sparse tensor cores on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return (), f"weights are {str(dtype).removeprefix('torch.')}; sparse tensor cores take float16 or bfloat16"
    major, minor = torch.cuda.get_device_capability(device)
    lt = (CUSPARSELT,) if torch.backends.cusparselt.is_available() else ()
    if major == 8:
        return (CUTLASS, *lt), f"compute capability {major}.{minor}"
    if major >= 9:
        why = f"compute capability {major}.{minor}" if lt else "this torch comes without cuSPARSELt"
        return lt, why
    return (), f"compute capability {major}.{minor} has no sparse tensor cores"


def compressed(weight: Tensor, backend: str) -> Tensor:
    """A 2:4 weight `(out, in)` on CUDA as torch's sparse semi-structured tensor, packed by our compressor.

    Raises:
        ValueError: the shape does not fit the backend.
    """
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    from nvit_kernels.sparse24 import compress_2to4
    from nvit_kernels.sparse24.cusparselt import compress_cusparselt

    if backend == CUTLASS:
        packed = compress_2to4(weight)
        return SparseSemiStructuredTensorCUTLASS(weight.shape, packed.values, packed.meta, None, None, None)
    buffer = compress_cusparselt(weight)
    return SparseSemiStructuredTensorCUSPARSELT(weight.shape, buffer, None, None, None, None)


@torch.inference_mode()
def choose(name: str, linear: nn.Linear, tokens: int, seconds: float = 0.2) -> Choice:
    """Measure one projection dense and in every sparse backend of its device; sparse only where it is faster."""
    weight = linear.weight.detach()
    offered, why = backends(weight.device, weight.dtype)
    if reason := refusal(weight):
        return Choice(name, DENSE, reason)
    if not offered:
        return Choice(name, MASKED, why)
    x = torch.randn(tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)
    forms, reasons = {DENSE: weight}, []
    for backend in offered:
        try:
            forms[backend] = compressed(weight, backend)
            F.linear(x, forms[backend], linear.bias)
        except (ValueError, RuntimeError) as e:
            forms.pop(backend, None)
            reasons.append(f"{backend}: {str(e).splitlines()[0]}")
    times = dict(
        zip(
            forms,
            time_each([partial(F.linear, x, w, linear.bias) for w in forms.values()], x.device, seconds),
            strict=True,
        )
    )
    sparse = {b: ms for b, ms in times.items() if b != "dense"}
    if not sparse:
        return Choice(name, "dense", "; ".join(reasons), times["dense"])
    best = min(sparse, key=sparse.__getitem__)
    if sparse[best] >= times["dense"]:
        return Choice(name, "dense", f"{best} is slower here", times["dense"], sparse[best])
    return Choice(name, best, "measured faster", times["dense"], sparse[best])


def measure(model: nn.Module, images: Tensor, dtype: torch.dtype, progress: Progress = silent) -> dict[str, Choice]:
    """For every projection, whether 2:4 would be faster on the model's device, by weight name.

    On a device without sparse tensor cores nothing is measured and every projection that a backend could take counts:
    `accelerate_` measures again where the snapshot is loaded.
    """
    tokens = images.shape[0] * adapters.find(model).tokens(model)
    chosen = {}
    for done, (name, linear) in enumerate(projections(model).items(), start=1):
        trial = nn.utils.skip_init(nn.Linear, *linear.weight.shape[::-1], linear.bias is not None).to(linear.weight)
        trial.load_state_dict(linear.state_dict())
        chosen[name] = choose(name, trial.to(dtype), tokens)
        progress(done, len(projections(model)), f"measure: {name}")
    return chosen


def accelerate_(model: nn.Module, batch_size: int = 64) -> list[Choice]:
    """Replace the 2:4 weights that `model.sparse24` names by compressed ones where that is measured faster.

    Args:
        batch_size: images a batch to measure with.

    Returns:
        What was chosen for every such projection, and why.
    """
    found = projections(model)
    tokens = batch_size * adapters.find(model).tokens(model)
    chosen = [choose(name, found[name], tokens) for name in model.sparse24]
    for choice in chosen:
        if choice.backend in (CUTLASS, CUSPARSELT):
            linear = found[choice.weight]
            linear.weight = nn.Parameter(compressed(linear.weight.detach(), choice.backend), requires_grad=False)
    return chosen


def _finish(model: nn.Module) -> None:
    """What `snapshot.load` does at last: 2:4 projections on sparse tensor cores, where the model is on a GPU."""
    if model.sparse24 and next(model.parameters()).device.type == "cuda":
        model.sparse24_choices = accelerate_(model)


snapshot.FINISHERS.append(_finish)
