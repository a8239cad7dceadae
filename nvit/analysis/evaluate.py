"""Accuracy and size of a model: top-1, top-5, images per second, parameters, MACs, peak memory."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import adapters
from ..serve import FixedBatch
from ..structure.compact import meta_copy
from ..training.batches import known_length, labelled
from ..utils.memory import LiveBytes
from ..utils.modes import compiled
from ..utils.progress import Progress, silent
from .share import standard_error


@torch.inference_mode()
def accuracy(
    model: nn.Module, loader, *, amp: str = "no", compile: bool = False, progress: Progress = silent
) -> dict[str, float]:
    """Top-1 with its standard error and top-5 in percent, mean cross entropy, images, and images per second of forward
    passes.

    Args:
        amp: no, bf16 or fp16.
        compile: through `torch.compile`, once: smaller batches are padded to the first one's size, and compiling is not
            counted as time of the passes.

    Raises:
        ValueError: the loader gives no image.
    """
    device = next(model.parameters()).device
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    was_training = model.training
    model.eval()
    top1 = top5 = seen = 0
    loss = busy = 0.0
    forward = partial(adapters.predict, model)
    total = known_length(loader) or 0
    for i, batch in enumerate(loader):
        images, labels = (t.to(device) for t in labelled(batch))
        with torch.autocast(device.type, dtype, enabled=amp != "no"):
            if compile and not seen:
                forward = FixedBatch(compiled(forward), torch.empty_like(images))
                forward(images)
            start = time.perf_counter()
            logits = forward(images).float()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        busy += time.perf_counter() - start
        ranked = logits.topk(min(5, logits.shape[1]), -1).indices == labels[:, None]
        top1 += int(ranked[:, :1].sum())
        top5 += int(ranked.sum())
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        seen += len(labels)
        progress(i + 1, total, f"evaluate: top-1 {100 * top1 / seen:.2f} %")
    model.train(was_training)
    if not seen:
        raise ValueError("the evaluation loader gave no image; it needs at least one")
    return {
        "top1": 100 * top1 / seen,
        "top1_se": standard_error(100 * top1 / seen, seen),
        "top5": 100 * top5 / seen,
        "loss": loss / seen,
        "images": seen,
        "images_per_s": seen / busy,
    }


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
