"""Accuracy and size of a model: its task's metrics, images per second, parameters, MACs, peak memory."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import adapters, tasks
from ..serve import FixedBatch
from ..structure.compact import meta_copy
from ..tasks import Task
from ..training.batches import Loader, known_length, parts
from ..utils.memory import LiveBytes
from ..utils.modes import compiled
from ..utils.progress import Progress, showing, silent


@showing
@torch.inference_mode()
def accuracy(
    model: nn.Module,
    loader: Loader,
    *,
    task: Task | str = "auto",
    reference: nn.Module | None = None,
    amp: str = "no",
    compile: bool = False,
    progress: Progress | bool = silent,
) -> dict[str, float]:
    """What the task's meter says of a model's answers (top-1 with its standard error and top-5 in percent
    and mean cross entropy, for classification), images, and images per second of forward passes.

    Args:
        task: one of `nvit.tasks`, or its name; `auto` for the one that the model tells.
        reference: the unpruned model, whose outputs stand in place of labels where a task reads none.
        amp: no, bf16 or fp16.
        compile: through `torch.compile`, once: smaller batches are padded to the first one's size, and compiling is not
            counted as time of the passes.
        progress: True shows what the commands show.

    Raises:
        ValueError: the loader gives no image, or labels that are not the task's.

    >>> model = nvit.load(nvit.BUNDLED)
    >>> loader = nvit.data.evaluation_loader(nvit.data.Digits(training=False), batch_size=120)
    >>> found = nvit.accuracy(model, loader)
    >>> found["images"], found["top1"] > 95
    (360, True)
    """
    task = tasks.of(task, model) if isinstance(task, str) else task
    if not task.reads_labels and reference is None:
        raise ValueError(
            f"task {task.name} compares a model with the unpruned one, which is not known here; give reference "
            "(--reference DENSE), or run nvit compare DENSE SNAPSHOT"
        )
    device = next(model.parameters()).device
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    was_training = model.training
    model.eval()
    meter, seen, busy = task.meter(), 0, 0.0
    forward = partial(adapters.predict, model)
    total = known_length(loader) or 0
    for i, batch in enumerate(loader):
        images, labels = parts(batch)
        images, labels = images.to(device), task.labels(images, labels).to(device)
        with torch.autocast(device.type, dtype, enabled=amp != "no"):
            if compile and not seen:
                forward = FixedBatch(compiled(forward), torch.empty_like(images))
                forward(images)
            start = time.perf_counter()
            outputs = forward(images).float()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        busy += time.perf_counter() - start
        meter.add(outputs, labels if task.reads_labels else adapters.predict(reference, images).float())
        seen += len(images)
        progress(i + 1, total, f"evaluate: {meter.so_far()}{seen} images")
    model.train(was_training)
    if not seen:
        raise ValueError("the evaluation loader gave no image; it needs at least one")
    return meter.value() | {"images": seen, "images_per_s": seen / busy}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def macs(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Multiply-accumulates of one image, by torch's FLOP counter on the meta device."""
    with FlopCounterMode(display=False) as counter:
        # Frozen: the counter's hooks stumble over a parameter that goes into a module as its input.
        meta_copy(model).to("meta").eval().requires_grad_(False)(torch.empty(1, *input_size, device="meta"))
    return counter.get_total_flops() // 2


@torch.no_grad()
def peak_memory(model: nn.Module, images: Tensor) -> int:
    """Bytes of weights, input and the most activations alive at once in a forward pass.

    On CUDA the allocator's own peak; elsewhere counted from every tensor an operation returns, so that workspace
    inside an operation is not seen.
    """
    held = sum(p.numel() * p.element_size() for p in model.parameters()) + images.numel() * images.element_size()
    if images.device.type == "cuda":
        before = torch.cuda.memory_allocated(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        model(images)
        return held + torch.cuda.max_memory_allocated(images.device) - before
    with LiveBytes([*model.parameters(), images]) as bytes_:
        model(images)
    return held + bytes_.peak
