"""Which sparse backend runs a 2:4 projection on this device, if any is faster than the dense one: measured, layer by
layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import adapters
from ..latency.clock import time_each
from ..structure import snapshot
from ..utils.progress import Progress, silent
from .kernels import CUSPARSELT, CUTLASS, compressed
from .masks import projections, refusal

MASKED, DENSE = "masked", "dense"


@dataclass(frozen=True)
class Choice:
    """How one projection runs on this device.

    Attributes:
        backend: `CUTLASS` or `cuSPARSELt`; `masked`, a dense weight with zeros, where there are no sparse tensor cores;
            `dense`, no mask at all.
        why: one phrase.
        dense_ms, sparse_ms: measured, None where nothing was.

    >>> nvit.sparse24.Choice("blocks.0.mlp.fc1.weight", nvit.sparse24.DENSE, "CUTLASS is slower here").masked
    False
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
    """Sparse backends this device can run at this dtype, and why there are none or which they are.

    >>> nvit.sparse24.backends(torch.device("cpu"), torch.float16)
    ((), 'no sparse tensor cores on cpu')
    """
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


@torch.inference_mode()
def choose(name: str, linear: nn.Linear, tokens: int, seconds: float = 0.2) -> Choice:
    """Measure one projection dense and in every sparse backend of its device; sparse only where it is faster.

    >>> nvit.sparse24.choose("fc1.weight", torch.nn.Linear(64, 128), tokens=32)
    Choice(weight='fc1.weight', backend='masked', why='no sparse tensor cores on cpu', ...)
    >>> nvit.sparse24.choose("fc1.weight", torch.nn.Linear(60, 128), tokens=32).why
    'shape (128, 60) is not in multiples of 16'
    """
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

    >>> model = nvit.load(nvit.BUNDLED)
    >>> chosen = nvit.sparse24.measure(model, torch.zeros(4, 1, 8, 8), torch.float16)
    >>> chosen["blocks.0.mlp.fc1.weight"].backend
    'masked'
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

    >>> model = nvit.load(nvit.BUNDLED)
    >>> model.sparse24 = tuple(nvit.sparse24.masks_2to4(model))
    >>> {choice.backend for choice in nvit.sparse24.accelerate_(model)}
    {'masked'}
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
