"""Flags that several commands share. A part's fields are flags and recipe keys as the command's own are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ...config import _help

if TYPE_CHECKING:
    import torch

DIGITS = "digits"
"""Names the bundled model and the bundled data."""

MODEL = _help("a timm name, hf-hub:NAME, local-dir:FOLDER, or the folder of a snapshot, a run or a Hugging Face model")
"""What MODEL may be, for the help of a command."""

SNAPSHOTS = "folders of snapshots or runs (of a run every snapshot, or that of --target), hf-hub:NAME, or digits"
"""What SNAPSHOT may be, of commands that read widths alone."""

NO_SNAPSHOT = "folders of snapshots or runs"
"""The same where none is named."""


MOST_WORKERS = 8
"""Data loading processes of a rank where nobody says how many."""

TARGET = _help("of a run's folder, the snapshot at this target; 0 for the smallest")


@dataclass(frozen=True, kw_only=True)
class GeneralFlags:
    """Every command's."""

    debug: Annotated[bool, _help("print the traceback of an error; else one nobody foresaw is kept in a file")] = False
    dump_config: Annotated[str, _help("write all settings of this run to a recipe, as run.toml; none if empty")] = ""


@dataclass(frozen=True, kw_only=True)
class BatchFlags:
    """What happens when memory runs out."""

    auto_batch: Annotated[bool, _help("where memory runs out, begin again with half of --batch-size")] = False


@dataclass(frozen=True, kw_only=True)
class LogFlags:
    """Curves of a run."""

    log: Annotated[
        Literal["none", "csv", "tensorboard", "trackio"],
        _help(
            "write loss, ratio, widths, images/s as the run goes, to OUT/log (of a snapshot: OUT_log); trackio: locally"
        ),
    ] = "none"

    @staticmethod
    def beside(out: str) -> Path:
        """The folder of a log beside a snapshot, which appears whole."""
        return Path(f"{Path(out)}_log")


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """What a named model is opened with."""

    checkpoint: Annotated[str, _help("weights for a timm model: a .safetensors or .pth file")] = ""
    pretrained: Annotated[bool, _help("load timm's pretrained weights when there is no checkpoint")] = True
    num_classes: Annotated[int, _help("of a timm model; 0 keeps the model's own")] = 0
    img_size: Annotated[
        tuple[int, ...], _help("pixels a side of the model's images, or height and width; the model's own if empty")
    ] = ()
    target: Annotated[float, TARGET] = 0.0

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width asked for, or None.

        Raises:
            ValueError: more than two numbers, or one that is not positive.
        """
        said = (self.img_size,) if isinstance(self.img_size, int) else tuple(self.img_size)
        if said in ((), (0,)):
            return None
        if len(said) > 2 or min(said) < 1:
            raise ValueError(f"--img-size {' '.join(map(str, said))}: expected a side, or height and width")
        return (said[0], said[-1])


@dataclass(frozen=True, kw_only=True)
class MachineFlags:
    """What a command runs on."""

    device: Annotated[str, _help("cpu, cuda, cuda:1; the GPU if there is one when empty")] = ""
    threads: Annotated[int, _help("CPU threads; as many as torch chooses when 0")] = 0
    kernels: Annotated[bool, _help("fused Triton kernels on CUDA")] = True

    def pick(self) -> torch.device:
        """The device; the GPU if there is one when empty, each rank's own under torchrun.

        Raises:
            ValueError: unknown, or not there.
        """
        import torch

        from ... import parallel

        try:
            device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError:
            raise ValueError(f"device {self.device!r} is unknown; use cpu, cuda or cuda:N") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r}: this machine has no usable CUDA GPU; use --device cpu")
        return parallel.own_device(device)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A command's work: with these threads, and with kernels or without whichever models it opens."""
        import torch

        from ...layers import functional

        if self.threads:
            torch.set_num_threads(self.threads)
        with functional.kernels(self.kernels):
            yield


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Which images."""

    data: Annotated[
        str,
        _help(
            "training images: a folder of class folders, with or without train/, or torch/cifar10[:FOLDER]; of images/ "
            "and labels/ for --task segmentation"
        ),
    ] = ""
    eval_data: Annotated[str, _help("evaluation images; val/ of --data when empty, if it has one")] = ""
    targets: Annotated[
        str, _help("CSV of image files below --data and their outputs, for --task multilabel and regression")
    ] = ""
    eval_targets: Annotated[str, _help("the same for evaluation, of files below --eval-data, or --data if empty")] = ""
    ignore_label: Annotated[
        int, _help("number in label files that stands for no class, for --task segmentation; 255 always does")
    ] = 255
    class_map: Annotated[str, _help("file with a class folder's name a line, in index order")] = ""
    class_order: Annotated[
        Literal["auto", "lexical", "natural"],
        _help(
            "order of class folders without names of the model's: 0 1 10 2 (lexical) or 0 1 2 10 (natural); auto asks "
            "the dense model"
        ),
    ] = "auto"
    accept_labels: Annotated[bool, _help("go on where the dense model cannot tell whether the labels fit it")] = False
    skip_broken: Annotated[bool, _help("leave out image files that cannot be decoded; reads each of them once")] = False
    resize: Annotated[bool, _help("resize before the centre crop; --no-resize for images that are small already")] = (
        True
    )
    eval_images: Annotated[int, _help("evaluate on so many, evenly over the set; 0 for all")] = 0
    workers: Annotated[int, _help("data loading processes; -1: as many as the machine's cores allow, 8 at most")] = -1

    def processes(self) -> int:
        """Data loading processes of this rank: the cores this machine lets it have, less one for training."""
        if self.workers >= 0:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(0, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


@dataclass(frozen=True, kw_only=True)
class LatencyFlags:
    """How latency is predicted and measured."""

    table: Annotated[str, _help("a latency table file, or `analytic`; measured on this device when empty")] = ""
    latency_batch: Annotated[int, _help("images a batch while latency is measured")] = 64
    latency_seconds: Annotated[float, _help("time for measuring a table")] = 40.0
    latency_mode: Annotated[
        Literal["auto", "graph", "eager", "compile"],
        _help("how models are called while latency is measured; auto: as CUDA graphs on a GPU, eager on a CPU"),
    ] = "auto"
    latency_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        _help("of weights and images while latency is measured; auto: bfloat16 on a GPU, float32 on a CPU"),
    ] = "auto"

    runtime: Annotated[
        Literal["torch", "onnxruntime", "openvino"],
        _help("what latency is measured in; beside torch the CPU's, models and pieces of them being exported to it"),
    ] = "torch"

    def deployed(self, device: torch.device) -> tuple[str, torch.dtype]:
        """Mode and dtype on this device.

        Raises:
            ValueError: a mode that the device has not, or a runtime that is not there.
        """
        from ...latency.clock import as_deployed, check_runtime

        asked = (None if word == "auto" else word for word in (self.latency_mode, self.latency_dtype))
        mode, dtype = as_deployed(device, *asked)
        check_runtime(self.runtime, device, mode, dtype)
        return mode, dtype
