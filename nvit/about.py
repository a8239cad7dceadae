"""Which optional parts are here."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import __version__, sparse24
from .latency.clock import device_name
from .serve import describe_choices


def describe() -> str:
    """A line for each optional part: there, or what is missing and how to get it.

    >>> print(nvit.describe())
    python ..., torch ...
    CUDA: ...
    """
    cuda = device_name("cuda") if torch.cuda.is_available() else "no GPU: everything runs on the CPU"
    lines = [f"python {platform.python_version()}, torch {torch.__version__}", f"CUDA: {cuda}"]
    triton = importlib.util.find_spec("triton") is not None
    lines.append(f"Triton, for fused kernels on CUDA: {'there' if triton else 'missing; pip install triton'}")
    theirs = importlib.util.find_spec("transformers") is not None
    lines.append(f"transformers, for Hugging Face models: {'there' if theirs else 'missing; pip install nvit[hf]'}")
    lines += [f"native 2:4 library, {half}: {word}" for half, word in sparse24.native().items()]
    lines += [f"kernel or torch, {line}" for line in describe_choices()]
    return "\n".join(lines)


def environment(device: torch.device | str) -> dict[str, Any]:
    """What a run was on, for its result.json: versions, machine, device, threads."""
    found: dict[str, Any] = {"nvit": __version__, "python": platform.python_version()}
    for name in ("torch", "timm", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an optional one
            continue
    return found | {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
