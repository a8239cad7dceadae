"""What the accuracy experiments share: DeiT-Ti, its images, answers by image, and masks of a share of the units."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch import Tensor, nn

from nvit import adapters, data, tasks
from nvit.calibration.statistics import gather_statistics
from nvit.cli.flags import DataFlags, ModelFlags
from nvit.cli.inputs import open_evaluation_data, open_images
from nvit.cli.models import open_model
from nvit.config import PruneConfig
from nvit.criteria.remaining import remaining_loss
from nvit.latency.table import LatencyTable
from nvit.refit.judge import Judge
from nvit.refit.refit import refit_
from nvit.refit.rotation import rotate_
from nvit.spec import KINDS, Group
from nvit.structure.compact import compact
from nvit.structure.masks import Masks, apply_, full_masks

MODEL = "deit_tiny_patch16_224"
INPUT = (3, 224, 224)
BATCH = 50
REPORTED_AT = {"all": (0.9, 0.8, 0.65)} | {kind: (0.1, 0.2, 0.3, 0.5) for kind in KINDS}
REPORTED_AT["heads"] = (0.1, 0.2, 0.3)  # a table's narrowest block has two of three
"""By what leaves: analytic latencies for all kinds together, else the share of the kind that is gone."""


def data_folder() -> Path:
    """The folder that NVIT_DATA names; ends the program with a line where it names none."""
    if not os.environ.get("NVIT_DATA"):
        sys.exit("NVIT_DATA is not set; it names the folder with DeiT-Ti's weights and the image samples")
    return Path(os.environ["NVIT_DATA"])


def data_flags(data: Path) -> list[str]:
    """Scores and training on imagenet_sample1000, evaluation on imagenet_val1300 cropped without resizing."""
    evaluation = ["--eval-data", f"{data}/imagenet_val1300", "--class-map", f"{data}/imagenet_synsets.txt"]
    weights = ["--checkpoint", f"{data}/deit_tiny_patch16_224.safetensors"]
    return [*weights, "--data", f"{data}/imagenet_sample1000/val", *evaluation, "--no-resize", "--device", "cpu"]


def dense_model(root: Path) -> nn.Module:
    """timm's DeiT-Ti with its trained weights, in evaluation mode."""
    model = timm.create_model(MODEL).eval()
    model.load_state_dict(load_file(root / f"{MODEL}.safetensors"))
    return model


def images_of(
    where: Path, model: nn.Module, class_map: Path | None, count: int | None = None
) -> list[tuple[Tensor, int]]:
    """Decoded images and labels, all or the first so many, kept in memory."""
    transform = data.transform(resolve_data_config(model=model), resize=False)
    names = str(class_map) if class_map else ""
    dataset = data.open_images(
        str(where), "validation", class_map=names, classes=model.num_classes, transform=transform
    )
    return [dataset[i] for i in range(len(dataset))[:count]]


def without_head(model: nn.Module) -> nn.Module:
    """A copy of a timm model that hands out the class token's features."""
    tower = copy.deepcopy(model)
    tower.reset_classifier(0)
    return tower.eval()


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """`(images, classes)`"""
    return torch.cat([model(x) for x in images.split(BATCH)])


@torch.inference_mode()
def answers(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Right or wrong by image, float `(images,)`."""
    return torch.cat([(model(x).argmax(-1) == y).float() for x, y in batches])


def ranked_together(groups: Sequence[Group], scores: Mapping[str, Tensor], kind: str, share: float) -> Masks:
    """Masks without the cheapest `share` of all units of a kind; one of every group stays."""
    mine = [g for g in groups if g.kind == kind]
    every = torch.cat([scores[g.name] for g in mine])
    least = every.sort().values[round(share * len(every))]
    return full_masks(groups) | {g.name: _at_least_one(scores[g.name] >= least, scores[g.name]) for g in mine}


def _at_least_one(keep: Tensor, score: Tensor) -> Tensor:
    return keep | (torch.arange(len(keep)) == score.argmax())


def in_every_group(groups: Sequence[Group], scores: Mapping[str, Tensor], kind: str, share: float) -> Masks:
    """Masks without the cheapest `share` of each group of a kind."""
    masks = full_masks(groups)
    for g in groups:
        if g.kind == kind:
            masks[g.name][scores[g.name].argsort(stable=True)[: round(share * g.size)]] = False
    return masks


class Bench:
    """The dense model, rotated, with what was seen on it, and images to calibrate and to evaluate on.

    Attributes:
        plain: the model as it was trained; `model` the same in each head's own basis.
        dense: right or wrong by evaluation image, of the dense model.
    """

    def __init__(self, data: Path, images: int, evaluate: int, name: str = MODEL) -> None:
        self.checkpoint = f"{data}/{name}.safetensors"
        where = DataFlags(
            data=f"{data}/imagenet_sample1000/val",
            eval_data=f"{data}/imagenet_val1300",
            class_map=f"{data}/imagenet_synsets.txt",
            resize=False,
            eval_images=evaluate,
        )
        self.plain = open_model(name, ModelFlags(checkpoint=self.checkpoint), torch.device("cpu"))
        loader = open_images(self.plain, where).training(PruneConfig(batch_size=BATCH), augment=False)
        self.calibration = [batch for batch, _ in zip(loader, range(-(-images // BATCH)), strict=False)]
        self.evaluation = list(open_evaluation_data(self.plain, where, BATCH))
        self.table = LatencyTable.analytic(self.plain)
        self.groups = adapters.find(self.plain).groups(self.plain)
        self.dense = answers(self.plain, self.evaluation)
        self.model, self.seen = self.rotated(self.calibration)

    def rotated(self, batches):
        """A copy of the dense model in each head's own basis, and what was seen on it."""
        model = copy.deepcopy(self.plain)
        seen = gather_statistics(model, [x for x, _ in batches])
        rotate_(model, seen)
        return model, seen

    def remaining(self) -> dict[str, Tensor]:
        """Scores by criterion `remaining`."""
        return remaining_loss(self.model, self.groups, full_masks(self.groups), self.seen)

    def pruned(self, masks: Masks, *, refit: bool, batches=None) -> nn.Module:
        """The compact model of one choice."""
        model = copy.deepcopy(self.model)
        apply_(model, self.groups, masks)
        if refit:
            refit_(model, self.model, self.groups, [x for x, _ in batches or self.calibration], statistics=self.seen)
        return compact(model, self.groups, masks)

    def judge(self) -> Judge:
        """Ready to tell how far models are from the dense one."""
        judge = Judge(self.model, self.groups, tasks.of("auto", self.model), statistics=self.seen)
        for x, _ in self.calibration:
            judge.take(x)
        judge.ready()
        return judge
