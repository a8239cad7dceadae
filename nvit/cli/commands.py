"""One frozen dataclass per command, composed of the library's configs and flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

from ..spec import KINDS

if sys.version_info >= (3, 11):
    pass
else:
    pass
from ..config import CriterionName, FinetuneConfig, PruneConfig, _help, check_choices

DIGITS = "digits"
"""Names the bundled model and the bundled data."""


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which model, on which device."""

    checkpoint: Annotated[str, _help("weights for a timm model: a .safetensors or .pth file")] = ""
    pretrained: Annotated[bool, _help("load timm's pretrained weights when there is no checkpoint")] = True
    num_classes: Annotated[int, _help("of a timm model; 0 keeps the model's own")] = 0
    img_size: Annotated[int, _help("pixels a side of a timm model's images; 0 keeps the model's own")] = 0
    device: Annotated[str, _help("cpu, cuda, cuda:1; the GPU if there is one when empty")] = ""
    threads: Annotated[int, _help("CPU threads; as many as torch chooses when 0")] = 0
    kernels: Annotated[bool, _help("fused Triton kernels on CUDA")] = True


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Which images."""

    data: Annotated[
        str, _help("training images: a folder of class folders, with or without train/, or torch/cifar10[:FOLDER]")
    ] = ""
    eval_data: Annotated[str, _help("evaluation images; val/ of --data when empty")] = ""
    class_map: Annotated[str, _help("file with a class folder's name a line, in index order")] = ""
    resize: Annotated[bool, _help("resize before the centre crop; --no-resize for images that are small already")] = (
        True
    )
    eval_images: Annotated[int, _help("evaluate on the first so many; 0 for all")] = 0
    workers: Annotated[int, _help("data loading processes")] = 0


@dataclass(frozen=True, kw_only=True)
class LatencyFlags:
    """How latency is predicted and measured."""

    table: Annotated[str, _help("a latency table file, or `analytic`; measured on this device when empty")] = ""
    latency_batch: Annotated[int, _help("images a batch while latency is measured")] = 64
    latency_seconds: Annotated[float, _help("time for measuring a table")] = 40.0


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """What a run starts from and where it goes."""

    model: Annotated[str, _help("a timm name, a snapshot folder, or a Hugging Face folder")] = DIGITS
    out: Annotated[str, _help("folder for snapshots, table, history and result.json")] = "nvit-run"
    resume: Annotated[bool, _help("go on where an interrupted run in --out stopped")] = False


@dataclass(frozen=True, kw_only=True)
class PruneCommand(PruneConfig, LatencyFlags, DataFlags, ModelFlags, RunFlags):
    """Prune a vision transformer to a latency target. Without --model: the bundled ViT on the bundled digits."""


@dataclass(frozen=True, kw_only=True)
class FinetuneCommand(FinetuneConfig, DataFlags, ModelFlags):
    """Finetune a compact model; with --scratch, train a new one."""

    out: Annotated[str, _help("folder for the snapshot and result.json")] = "nvit-finetuned"
    teacher: Annotated[str, _help("the unpruned model for L_full, named as MODEL is; none if empty")] = ""
    teacher_checkpoint: Annotated[str, _help("its weights")] = ""
    scratch: Annotated[bool, _help("start from random weights")] = False
    resume: Annotated[bool, _help("go on where an interrupted run in --out stopped")] = False


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(DataFlags, ModelFlags):
    """Top-1 and top-5 accuracy, and images per second."""

    batch_size: Annotated[int, _help("images a batch")] = 64
    amp: Annotated[Literal["no", "bf16", "fp16"], _help("mixed precision")] = "no"
    out: Annotated[str, _help("folder for result.json; none if empty")] = ""


@dataclass(frozen=True, kw_only=True)
class CompareCommand(LatencyFlags, DataFlags, ModelFlags):
    """Parameters, MACs, latency, memory and accuracy of several models, side by side; the first is the reference."""

    batch_size: Annotated[int, _help("images a batch while evaluating")] = 64
    seconds: Annotated[float, _help("time for measuring latency, all models in turn")] = 20.0
    out: Annotated[str, _help("folder for result.json and compare.csv; none if empty")] = ""


@dataclass(frozen=True, kw_only=True)
class LatencyCommand(ModelFlags):
    """Measure a latency table, or show one."""

    model: Annotated[str, _help("a timm name, a snapshot folder, or a Hugging Face folder")] = DIGITS
    table: Annotated[str, _help("show this table instead of measuring; or `analytic`")] = ""
    latency_batch: Annotated[int, _help("images a batch")] = 64
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], _help("of weights and images")] = "float32"
    latency_seconds: Annotated[float, _help("time for measuring")] = 40.0
    out: Annotated[str, _help("folder for latency_table.json and result.json; none if empty")] = ""


@dataclass(frozen=True, kw_only=True)
class SparsifyCommand(FinetuneConfig, DataFlags, ModelFlags):
    """2:4 sparsity of the blocks' projections: masks, channel order, masked finetuning, speed and accuracy."""

    epochs: Annotated[float, _help("of finetuning under the fixed masks; 0 for none")] = 0.0
    permute: Annotated[bool, _help("reorder hidden units and V dims first, so that 2:4 keeps more")] = True
    permute_seconds: Annotated[float, _help("bound on the search for an order, all layers together")] = 60.0
    dtype: Annotated[Literal["float16", "bfloat16"], _help("of weights on sparse tensor cores")] = "float16"
    latency_batch: Annotated[int, _help("images a batch while speed is measured")] = 64
    teacher: Annotated[str, _help("the model for L_full, as in finetune; the dense snapshot itself if empty")] = ""
    teacher_checkpoint: Annotated[str, _help("its weights")] = ""
    out: Annotated[str, _help("folder for the sparse snapshot and result.json")] = "nvit-sparse"


@dataclass(frozen=True, kw_only=True)
class WidthsCommand:
    """Widths of every block of one or several snapshots, as a CSV and a figure (the paper's Fig. 4)."""

    out: Annotated[str, _help("folder for widths.csv, widths.png and result.json")] = "nvit-widths"


@dataclass(frozen=True, kw_only=True)
class CorrelationCommand(DataFlags, ModelFlags):
    """Saliency against the true loss change of removing a bundle, for some bundles of every group (App. B.5)."""

    criterion: Annotated[tuple[CriterionName, ...], _help("saliencies to compare, on the same bundles and images")] = (
        "hessian",
        "abs",
    )
    bundles: Annotated[int, _help("bundles of every group, evenly over the ranks of each criterion")] = 8
    batches: Annotated[int, _help("batches of --data that are scored and on which the loss change is measured")] = 4
    batch_size: Annotated[int, _help("images a batch")] = 64
    labels: Annotated[Literal["true", "sampled"], _help("of the scores: the data's, or drawn from the model")] = "true"
    only: Annotated[tuple[str, ...], _help(f"kinds to look at, of {', '.join(KINDS)}; all if empty")] = ()
    seed: Annotated[int, _help("of the choice of images")] = 0
    out: Annotated[str, _help("folder for correlation.csv, correlation.png and result.json")] = "nvit-correlation"

    def check(self) -> None:
        """Raise ValueError where a value makes no sense."""
        check_choices(self)
        for name in ("bundles", "batches", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.criterion:
            raise ValueError("criterion is empty; give at least one, as hessian")
        self.scoring().check()

    def scoring(self) -> PruneConfig:
        """How its images are scored."""
        shared = {name: getattr(self, name) for name in ("batch_size", "labels", "only", "seed")}
        return PruneConfig(train=False, **shared)
