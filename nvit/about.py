"""Which optional parts are here."""

from __future__ import annotations

import importlib.util
import platform

import torch


def describe() -> str:
    """A line for each optional part: there, or what is missing and how to get it."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: everything runs on the CPU"
    lines = [f"python {platform.python_version()}, torch {torch.__version__}", f"CUDA: {cuda}"]
    for module, what in (("triton", "Triton, for fused kernels on CUDA"),):
        there = importlib.util.find_spec(module) is not None
        lines.append(f"{what}: {'there' if there else f'missing; pip install {module}'}")
    return "\n".join(lines)
