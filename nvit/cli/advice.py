"""What a run could have that it was not given: said before it starts, and after it where much was lost."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from ..config import PruneConfig
from ..criteria.registry import CRITERIA
from .flags import DIGITS, DataFlags, MachineFlags, ModelFlags

FEW = 300
"""Calibration images below which a word is said."""

LOSS = 5.0
"""Points of top-1 whose loss is worth a word."""

BY_IMAGES = {64: (54.9, 65.2), 256: (60.8, 73.9), 1000: (64.1, 76.6)}
"""Top-1 of DeiT-Ti (dense 80.8 %) at 0.65 of its operations by calibration images, without and with a refit:
docs/refit.md."""


def few_images(config: PruneConfig, images: int | None) -> str | None:
    """What to say before a run that is calibrated on few images; None where it has enough or reads none."""
    reads = config.refit or CRITERIA[config.saliency].capabilities.images
    if config.train or images is None or images >= FEW or not reads:
        return None
    return f"calibrated on {images} images, which are few: {_gains(config)}; give --images 512, or more --data"


def _gains(config: PruneConfig) -> str:
    by = "; ".join(f"{n} {after[config.refit]:.1f} %" for n, after in BY_IMAGES.items())
    return f"DeiT-Ti at 0.65 keeps with so many images {by} (of 80.8 %, docs/refit.md)"


def fall(before: float | None, after: float | None) -> float | None:
    """Points of top-1 lost, where they are worth a word."""
    return None if before is None or after is None or before - after <= LOSS else before - after


def ways_back(
    model: str,
    config: PruneConfig,
    images: int | None,
    found: Mapping[str, Any],
    *,
    opening: ModelFlags,
    machine: MachineFlags,
    where: DataFlags,
    labelled: bool,
) -> Iterator[str]:
    """Lines about every snapshot that lost more than `LOSS` points: what another run, or more work on it, would give
    back. None where nothing was lost.

    Args:
        images: the calibration had.
        labelled: whether the images can be trained on.
    """
    dense = found["dense"].get("top1")
    rows = [(row, lost) for row in found["snapshots"] if (lost := fall(dense, row.get("top1"))) is not None]
    for row, lost in rows:
        yield f"target {row['target']:g}: top-1 fell by {lost:.1f} points"
    if not rows:
        return
    if not config.train:
        if images is not None and images < max(BY_IMAGES):
            yield f"  --images {max(BY_IMAGES)} for {images}: {_gains(config)}"
        if not config.refit and not config.budget:
            yield "  --refit: took DeiT-Ti at 0.65 from 61.8 to 75.1 %, at 0.5 from 19.3 to 62.4 % (docs/refit.md)"
        if config.rounds == 1:
            yield "  --rounds 2: looks again half way, another point at 0.5 (docs/refit.md)"
    if not labelled:
        yield "  nvit finetune: trains a snapshot; it needs images with labels"
        return
    for row, _ in rows:
        yield f"  {finetune_line(row['path'], model, opening=opening, machine=machine, where=where)}"


def finetune_line(path: str, model: str, *, opening: ModelFlags, machine: MachineFlags, where: DataFlags) -> str:
    """The command that trains a snapshot further with the dense model as its teacher, ready to paste."""
    words = ["nvit", "finetune", path, "--out", f"{path}-finetuned"]
    # A teacher is opened by its name and weights alone.
    if (opening.pretrained or opening.checkpoint or model == DIGITS) and not (opening.num_classes or opening.size):
        words += ["--teacher", model]
        words += ["--teacher-checkpoint", opening.checkpoint] if opening.checkpoint else []
    return shlex.join([*words, "--epochs", "30", *_given(where), *_given(machine)])


def _given(flags: Any) -> Iterator[str]:
    """The flags of a part that are not as they are by default, as words."""
    for field in dataclasses.fields(flags):
        value, name = getattr(flags, field.name), field.name.replace("_", "-")
        if value != field.default:
            yield from (
                [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
            )
