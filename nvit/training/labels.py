"""Which class number a folder's name stands for: by the model's own names, or asked of the dense model itself."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import adapters
from .folders import natural_key

WITNESSED = 256
"""Images on which the dense model is asked."""


@dataclass(frozen=True)
class Numbering:
    """Class numbers by folder name, and in a few words where they come from."""

    class_to_idx: Mapping[str, int]
    how: str


def read_class_map(path: str | Path) -> dict[str, int]:
    """Class numbers from a file with a class folder's name a line, in index order.

    Raises:
        ValueError: no such file, or a name that comes twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"class map {path} does not exist")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    names = names[:-1] if names and not names[-1] else names
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    if twice is not None:
        raise ValueError(f"class map {path} lists {twice!r} twice; a class has one line")
    return {name: i for i, name in enumerate(names)}


def numberings(
    names: Sequence[str], classes: int, *, model_names: Mapping[str, int] | None = None, order: str = "auto"
) -> list[Numbering]:
    """Possible class numbers for folders called `names`, where no class map is given; several where it has to be asked.

    Args:
        classes: how many the model tells apart.
        model_names: the model's own label names, if it has any.
        order: `auto`, or `lexical` (torchvision's: 0, 1, 10, 2) or `natural` (timm's: 0, 1, 2, 10).

    Raises:
        ValueError: another number of folders than classes, and names that are not the model's.
    """
    lexical = {n: i for i, n in enumerate(sorted(names))}
    natural = {n: i for i, n in enumerate(sorted(names, key=natural_key))}
    if order == "auto" and model_names and set(names) <= model_names.keys():
        return [Numbering({n: model_names[n] for n in names}, "the model's own label names")]
    if len(names) != classes:
        hint = ""
        if model_names and (odd := sorted(set(names) - model_names.keys())):
            close = difflib.get_close_matches(odd[0], list(model_names), n=1)
            hint = f" {odd[0]!r} is none of the model's label names" + (f", {close[0]!r} is." if close else ".")
        raise ValueError(
            f"the data has {len(names)} class folders but the model has {classes} classes.{hint} Give --class-map with "
            "the model's class names in index order, or nvit finetune --new-head for a head of these classes."
        )
    if order == "lexical" or lexical == natural:
        return [Numbering(lexical, "lexical order of the folders")]
    if order == "natural":
        return [Numbering(natural, "natural order of the folders")]
    return [Numbering(natural, "natural order (0, 1, 2, 10)"), Numbering(lexical, "lexical order (0, 1, 10, 2)")]


def mapped(names: Sequence[str], class_map: Mapping[str, int], source: str, classes: int) -> Numbering:
    """Class numbers by a class map.

    Raises:
        ValueError: a folder that the map does not list, or a number the model does not have.
    """
    for name in names:
        if name not in class_map:
            close = difflib.get_close_matches(name, list(class_map), n=1)
            near = f"; the nearest entry is {close[0]!r}" if close else ""
            raise ValueError(f"class folder {name!r} is not in class map {source}{near}. Every folder needs its line.")
    if (most := max(class_map[n] for n in names)) >= classes:
        raise ValueError(f"class map {source} numbers classes up to {most}; the model has {classes}")
    return Numbering({n: class_map[n] for n in names}, f"class map {source}")


def interval(right: int, images: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `right` in `images`."""
    share, zz = right / images, z * z
    middle = (share + zz / (2 * images)) / (1 + zz / images)
    half = z / (1 + zz / images) * math.sqrt(share * (1 - share) / images + zz / (4 * images * images))
    return middle - half, middle + half


def chosen(candidates: Sequence[Numbering], right: Sequence[int], images: int, classes: int) -> tuple[int, str]:
    """The numbering under which the dense model is right most often, and a sentence that says so.

    Args:
        right: images of `images` that it names rightly, by candidate.

    Raises:
        ValueError: intervals of two candidates overlap, or the best one's holds chance.
    """
    order = sorted(range(len(candidates)), key=lambda i: -right[i])
    best, share = order[0], 100 * right[order[0]] / images
    low, _ = interval(right[best], images)
    if low <= 1 / classes:
        raise ValueError(
            f"the dense model names {right[best]} of {images} images rightly ({share:.1f} %), no better than chance: "
            "labels, channels or preprocessing do not fit this model. Check --class-map, --class-order and the model's "
            "preprocessing, or go on with --accept-labels."
        )
    said = f"labels by {candidates[best].how}: the dense model names {share:.1f} % of {images} images rightly"
    if len(order) > 1:
        other = order[1]
        if interval(right[other], images)[1] >= low:
            raise ValueError(
                f"{candidates[best].how} and {candidates[other].how} of the class folders fit the dense model about "
                f"equally ({right[best]} and {right[other]} of {images} images). Give --class-map or --class-order, or "
                "go on with --accept-labels."
            )
        said += f" ({100 * right[other] / images:.1f} % by {candidates[other].how})"
    return best, said


@torch.inference_mode()
def answers(model: nn.Module, batches, most: int = WITNESSED) -> tuple[Tensor, Tensor]:
    """The classes a model names for up to `most` images, and the labels that came with them, int64 `(images,)`."""
    device, was = next(model.parameters()).device, model.training
    model.eval()
    found, labels = [], []
    for images, theirs in batches:
        found.append(adapters.predict(model, images.to(device)).argmax(-1).cpu())
        labels.append(theirs)
        if sum(map(len, labels)) >= most:
            break
    model.train(was)
    return torch.cat(found)[:most], torch.cat(labels)[:most]


def ask(
    model: nn.Module,
    names: Sequence[str],
    candidates: Sequence[Numbering],
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    *,
    accept: bool = False,
) -> tuple[Numbering, str]:
    """Ask the dense model which of several numberings is its own.

    Args:
        batches: of a few hundred images, spread over the classes, labelled by the place of their folder in `names`.
        accept: take the likeliest one where the model cannot tell, and say so.

    Raises:
        ValueError: it cannot tell; see `chosen`.
    """
    said, places = answers(model, batches)
    right = []
    for candidate in candidates:
        number = torch.tensor([candidate.class_to_idx[name] for name in names])
        right.append(int((said == number[places]).sum()))
    try:
        best, sentence = chosen(candidates, right, len(said), classes)
    except ValueError as e:
        if not accept:
            raise
        best = max(range(len(candidates)), key=right.__getitem__)
        sentence = f"labels by {candidates[best].how}, accepted as they are: {e}"
    return candidates[best], sentence
