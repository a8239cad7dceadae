"""Class folders on two sides for towers that have no classes of their own: images that are known, and images asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch.utils.data import Dataset

from .data import open_images
from .folders import scan, split_folders


def labelled_sides(
    where: str,
    evaluated: str,
    *,
    transform: Callable,
    channels: int = 3,
    skip_broken: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Dataset, Dataset] | None:
    """Images whose classes are known, and images whose classes are to be told; numbered alike, by name.

    Args:
        where: class folders, of train/ where there are splits.
        evaluated: class folders, of val/ where there are splits; `where` has both where this is empty.
        skip_broken: leave out files that cannot be decoded.
        say: called with the reason where there are no two sides.

    Returns:
        None where one of the sides is missing, has no class folders, or is the other one.

    Raises:
        ValueError: an asked class that the known images do not have.
    """
    places = [_side(where, "train"), _side(evaluated or where, "validation")]
    names = ("known images (--data)", "asked images (--eval-data, or val/ of --data)")
    for place, name in zip(places, names, strict=True):
        if place is None or "" in scan(place).names:
            say(f"k-NN and the linear probe are left out: there are no class folders of {name}")
            return None
    if places[0].resolve() == places[1].resolve():
        say("k-NN and the linear probe are left out: known and asked images are the same; give others with --eval-data")
        return None
    numbers = {name: i for i, name in enumerate(scan(places[0]).names)}
    known, asked = (
        open_images(
            str(place),
            "train",
            classes=len(numbers),
            transform=transform,
            numbering=numbers,
            channels=channels,
            skip_broken=skip_broken,
        )
        for place in places
    )
    return known, asked


def _side(where: str, split: str) -> Path | None:
    if not where or not Path(where).is_dir():
        return None
    found = split_folders(Path(where))
    return found.get(split) if found else Path(where)
