"""Which classes labelled images have, and their names in the order of their numbers."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import Dataset

from .folders import natural_key, scan, split_folder
from .labels import mapped, read_class_map
from .timm_sets import timm_images


def class_names(where: str, class_map: str = "") -> tuple[str, ...]:
    """Names of the classes of training images, in the order of their numbers: by a class map, in natural order of class
    folders (0, 1, 2, 10), or as a timm data set has them.

    Args:
        where: as `data.open_images` takes it.

    Raises:
        ValueError: no such images, or they do not say their classes; fewer than two are none.
    """
    if Path(where).is_file():
        raise ValueError(f"data {where!r} is a list of images without classes; give class folders")
    if Path(where).is_dir():
        names = scan(split_folder(Path(where), "train")).names
        if names == [""]:
            raise ValueError(f"data {where!r} holds images without class folders; expected FOLDER/<class>/<image>")
        if class_map:
            numbers = read_class_map(class_map)
            mapped(names, numbers, class_map, len(numbers))
            names = list(numbers)
        found = tuple(sorted(names, key=natural_key)) if not class_map else tuple(names)
    else:
        found = names_of(timm_images(where, "train", class_map, None, 3)) or ()
        if not found:
            raise ValueError(f"data {where!r} does not say its classes; write it out as FOLDER/<class>/<image>")
    if len(found) < 2:
        raise ValueError(f"data {where!r} has {len(found)} class; a classifier needs 2")
    return found


def names_of(dataset: Dataset) -> tuple[str, ...] | None:
    """Names of the classes of a timm data set: torchvision's say `classes`, Hugging Face's a feature with names. None
    where it has neither."""
    if names := getattr(dataset, "classes", None):
        return tuple(", ".join(n) if isinstance(n, tuple) else str(n) for n in names)
    inside = getattr(getattr(dataset, "reader", None), "dataset", None)
    for feature in (getattr(inside, "features", None) or {}).values():
        if names := getattr(feature, "names", None):
            return tuple(map(str, names))
    return None
