"""A training step of DeiT-B on a GPU: timm's model, ours dense, masked to half of every width, and its compact twin.

    python -m benchmarks.engine.training_step [--batch-size 128]

Forward, cross entropy, backward and AdamW under bf16 autocast; ours with fused kernels and without, timm's compiled as
well. `ms` is the time of a step among steps, as in a loop; `device_ms` the same work replayed from a CUDA graph, which
no host slows down; `host_ms` what the host needs to enqueue it. Nothing is timed before its logits are right. Writes
<GPU>_training_step.csv.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.engine.library import Setting, first_line, half_masks
from benchmarks.harness import Records, relative_error
from benchmarks.timing import back_to_back, timings
from nvit import adapters
from nvit.layers import functional
from nvit.structure.compact import compact
from nvit.structure.masks import apply_

ERROR = 0.05
"""Largest difference of bf16 logits over the largest logit: eight bits through twelve blocks."""


def step_of(model: nn.Module, images: Tensor, labels: Tensor, setting: Setting) -> Callable[[], Tensor]:
    """One step of AdamW, returning its loss; it can be captured in a CUDA graph."""
    cuda = setting.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=cuda, capturable=cuda)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with setting.autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def logits(model: nn.Module, images: Tensor, setting: Setting) -> Tensor:
    """With gradients on, so that a compiled model is compiled once, for its step."""
    with setting.autocast():
        return model(images).detach().float()


def dense_engine(setting: Setting) -> nn.Module:
    """Our layers in timm's model, nothing pruned."""
    model = setting.create()
    return adapters.find(model).prepare(model)


def halves(setting: Setting, twin: bool) -> nn.Module:
    """Masked to half of every width, or its compact twin."""
    model = dense_engine(setting)
    groups = adapters.find(model).groups(model)
    masks = half_masks(groups, torch.Generator().manual_seed(0))
    apply_(model, groups, masks)
    return compact(copy.deepcopy(model).cpu(), groups, masks).to(setting.device).eval() if twin else model


def cases(setting: Setting, compiled: bool) -> Iterator[tuple[str, bool | None, Callable[[], nn.Module], str]]:
    """Name, kernels on or off (None for timm's), the model, and the name of the case whose logits it must have."""
    yield "timm, dense", None, setting.create, ""
    for on in (True, False):
        yield "engine, dense", on, partial(dense_engine, setting), "timm, dense"
        yield "compact twin of half", on, partial(halves, setting, True), "" if on else "compact twin of half"
        yield "engine, masked to half", on, partial(halves, setting, False), "compact twin of half"
    if compiled:
        yield "timm, dense, torch.compile", None, lambda: torch.compile(setting.create()), "timm, dense"


def measure(model: nn.Module, images: Tensor, labels: Tensor, setting: Setting, seconds: float) -> dict:
    """A row's numbers for one model."""
    step = step_of(model, images, labels, setting)
    cuda = setting.device.type == "cuda"
    if cuda:
        step()
        torch.cuda.reset_peak_memory_stats()
    ms, p20, p80 = back_to_back(step, seconds)
    row = {"ms": ms, "p20_ms": p20, "p80_ms": p80, "images_per_s": 1e3 * len(images) / ms}
    if cuda:
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        alone = timings({"step": step}, seconds / 2)["step"]
        host_ms = alone.host_ms and alone.host_ms[0]
        row |= {"device_ms": alone.ms[0], "host_ms": host_ms, "note": alone.note}
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=1.0, help="a case")
    parser.add_argument("--no-compile", action="store_true", help="leave out timm's compiled model")
    parser.add_argument(
        "--only-compile", action="store_true", help="compile timm's step, fill the caches, time nothing"
    )
    parser.add_argument("--tiny", action="store_true", help="two small blocks on a CPU, to try every line")
    parser.add_argument("--out", type=Path, help="folder of the CSV; benchmarks/results by default")
    args = parser.parse_args()
    setting = Setting.of(args.tiny, args.batch_size)
    images, labels = setting.batch(setting.create())
    if args.only_compile:
        step_of(torch.compile(setting.create()), images, labels, setting)()
        return 0
    records, failed = Records("training_step", setting.device, args.out), 0
    exact: dict[str, Tensor] = {}
    for case, on, make, like in cases(setting, not args.no_compile):
        row = {"case": case, "kernels": on, "batch_size": len(images), "dtype": str(setting.amp or torch.float32)[6:]}
        try:
            with functional.kernels(on is not False):
                model = make()
                found = logits(model, images, setting)
                error = relative_error(found, exact[like]) if like in exact else 0.0
                exact.setdefault(case, found)
                if error > ERROR:
                    raise AssertionError(f"logits are {error:.1e} of the largest from those of {like}; not timed")
                row |= {"error": error} | measure(model, images, labels, setting, args.seconds)
        except Exception as broken:  # the other cases are measured all the same
            failed += 1
            row["note"] = first_line(broken)
        records.add(**row)
        records.save()
        model = found = None
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
