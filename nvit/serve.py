"""A model as it is served: the faster way of every op, batches of one size, and on CUDA one graph replayed for each."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from . import adapters
from .latency.clock import Stopwatch, device_name
from .layers import choice
from .utils import modes
from .utils.files import cache_folder

CHOICE_SECONDS = 0.05
"""Time for a measurement of an op's two ways, first calls apart."""


class FixedBatch:
    """A function of images for a fixed number of them, called with any number: in portions, the last one padded.

    Args:
        function: of `held`, with the batch first in its result.
        held: `(batch, channels, height, width)`: where each portion is copied to. Its size, dtype and device are what
            the function takes.
        replays: the function is called with nothing, reads `held` by itself and returns the same tensor every time, so
            that it is copied out.
    """

    def __init__(self, function: Callable[..., Tensor], held: Tensor, *, replays: bool = False) -> None:
        self.function, self.held, self.replays = function, held, replays

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Results for `images` `(n, …)`, on the device, `(n, …)`; n may be anything, also 0.

        Raises:
            ValueError: images of another size.
        """
        if images.shape[1:] != self.held.shape[1:]:
            found, wanted = (" × ".join(map(str, shape)) for shape in (images.shape[1:], self.held.shape[1:]))
            raise ValueError(f"images are {found}, this model was made ready for {wanted}; resize them")
        portions = [self._portion(part) for part in images.split(len(self.held))]
        return portions[0] if len(portions) == 1 else torch.cat(portions)

    def _portion(self, images: Tensor) -> Tensor:
        n = len(images)
        self.held[:n].copy_(images, non_blocking=self.held.is_cuda)
        self.held[n:].zero_()
        if self.replays:
            return self.function()[:n].clone()
        return self.function(self.held)[:n]


class Graphed(FixedBatch):
    """What `graphed` returns."""

    def __init__(self, model: nn.Module, held: Tensor) -> None:
        run, self.name = partial(adapters.predict, model), type(model).__name__
        replays = held.is_cuda
        if replays:
            with torch.no_grad():
                run = modes.captured(run, (held,))
        super().__init__(run, held, replays=replays)

    def __repr__(self) -> str:
        batch, *size = self.held.shape
        how = "replays a CUDA graph" if self.replays else f"plain calls: there are no CUDA graphs on {self.held.device}"
        dtype = str(self.held.dtype).removeprefix("torch.")
        return f"Graphed({self.name}, {batch} images of {' × '.join(map(str, size))}, {dtype}; {how})"


def graphed(model: nn.Module, batch_size: int) -> Graphed:
    """A callable that gives the logits of any number of images, `batch_size` at a time, by replaying a CUDA graph.

    The host enqueues a whole forward pass at once, so that small batches and narrow models take the device's own time.
    Less than a batch is padded and cut again. Images may come from any device in any dtype. On a CPU it calls the
    model, with the same padding, and its `repr` says so. A graph reads the model's weights where they lie: train or
    move the model, and make a new one.

    ```python
    small = nvit.graphed(nvit.load("nvit_b", device="cuda", dtype=torch.bfloat16), batch_size=64)
    logits = small(images)
    ```

    Raises:
        ValueError: no positive batch, a model in training mode, or one of a family without an adapter.

    >>> small = nvit.graphed(nvit.load(nvit.BUNDLED), batch_size=4)
    >>> small
    Graphed(VisionTransformer, 4 images of 1 × 8 × 8, float32; ...)
    >>> small(torch.zeros(6, 1, 8, 8)).shape
    torch.Size([6, 10])
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before nvit.graphed")
    p = next(model.parameters())
    size = adapters.preprocess(model)["input_size"]
    return Graphed(model, torch.zeros(batch_size, *size, device=p.device, dtype=p.dtype))


def _device_ms(ways: Sequence[Callable[..., Tensor]], tensors: Sequence[Tensor | None]) -> list[float]:
    """Milliseconds of each way by the device's own time."""
    watch = Stopwatch(tensors[0].device, "graph")
    for way in ways:
        watch.add(way, *tensors)
    return watch.medians(time.perf_counter() + CHOICE_SECONDS)


def _kept_choices(device: torch.device) -> Path:
    """Where the choices of a device are kept: measured with this torch, this Triton and these kernels."""
    of = ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "nvit"))
    name = re.sub(r"\W+", "-", f"{device_name(device)} {of}".lower())
    return cache_folder() / "kernels" / f"{name}.json"


def _version(package: str) -> str:
    with suppress(PackageNotFoundError):
        return version(package)
    return "none"


choice.use(choice.Choices(_device_ms, _kept_choices))


def describe_choices() -> list[str]:
    """A line for each GPU and op: on how many shapes the kernel was measured faster, and where it is written."""
    lines, choices = [], choice.used()
    for i in range(torch.cuda.device_count() if choices else 0):
        device = torch.device("cuda", i)
        lines += choices.describe(device)
    return lines
