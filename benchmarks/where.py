"""Where something was measured: device, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path

import torch


@cache
def commit() -> str:
    """The checked-out commit, with a plus sign when tracked files differ from it."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"


@cache
def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def device() -> torch.device:
    """Where kernels are measured."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(of: torch.device | str | None = None) -> str:
    """The GPU's or processor's own name; of what `device` says without an argument."""
    if torch.device(of or device()).type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def setting() -> str:
    """The GPU's name, or the processor's with its threads."""
    name = device_name()
    return name if device().type == "cuda" else f"CPU {name}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """A name as files have it."""
    return "".join(c if c.isalnum() else "_" for c in name.lower()).strip("_")
