"""Flags of `nvit sparsify`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ...config import FinetuneConfig, _help
from ..command import Command
from .parts import MODEL, DataFlags, GeneralFlags, LogFlags, MachineFlags, ModelFlags


@dataclass(frozen=True, kw_only=True)
class MaskedFinetuning(FinetuneConfig):
    """Finetuning that is left out unless asked for."""

    epochs: Annotated[float, _help("of finetuning under the fixed masks; 0 for none")] = 0.0


@dataclass(frozen=True, kw_only=True)
class SparsifyCommand:
    """2:4 sparsity of the blocks' projections: masks, finetuning, speed, accuracy."""

    model: Annotated[str, MODEL] = ""
    choice: Annotated[
        Literal["magnitude", "curvature"],
        _help(
            "which two of four stay: the largest, or by the loss of outputs on calibration images, changing what stays"
        ),
    ] = "magnitude"
    images: Annotated[int, _help("calibration images of --data, spread over it, for --choice curvature; no labels")] = (
        512
    )
    damping: Annotated[float, _help("of the inputs' covariance, a share of its mean, for --choice curvature")] = 0.1
    permute: Annotated[bool, _help("reorder hidden units and V dims first, so that 2:4 keeps more")] = True
    permute_seconds: Annotated[float, _help("bound on the search for an order, all layers together")] = 60.0
    dtype: Annotated[Literal["float16", "bfloat16"], _help("of weights on sparse tensor cores")] = "float16"
    latency_batch: Annotated[int, _help("images a batch while speed is measured")] = 64
    teacher: Annotated[str, _help("the model for L_full, as in finetune; the dense snapshot itself if empty")] = ""
    teacher_checkpoint: Annotated[str, _help("its weights")] = ""
    out: Annotated[str, _help("folder for the sparse snapshot, result.json and projections.csv")] = "nvit-sparse"
    opening: ModelFlags = field(default_factory=ModelFlags)
    machine: MachineFlags = field(default_factory=MachineFlags)
    where: DataFlags = field(default_factory=DataFlags)
    config: MaskedFinetuning = field(default_factory=MaskedFinetuning)
    logging: LogFlags = field(default_factory=LogFlags)
    general: GeneralFlags = field(default_factory=GeneralFlags)

    def check(self) -> None:
        """Raise ValueError where there would be nothing to log."""
        if self.logging.log != "none" and not self.config.epochs:
            raise ValueError(f"--log {self.logging.log} is of finetuning, and --epochs is 0; give some or leave it out")


COMMAND = Command(
    SparsifyCommand,
    "sparsify",
    first=("data", "eval_data", "choice", "images", "epochs", "out", "latency_batch", "dtype", "device", "target"),
)
