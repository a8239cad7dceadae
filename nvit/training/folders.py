"""Image files in class folders: which are there, which are read, which split and class they belong to."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLITS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
"""Names of the folder of a split, in any case."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's image mode by a model's input channels."""


class BrokenImage(ValueError):
    """An image file that cannot be decoded. One line, also when it comes out of a data loading process."""

    def __str__(self) -> str:
        return super().__str__().strip().splitlines()[-1].rpartition("BrokenImage: ")[2]


@dataclass(frozen=True)
class Scan:
    """What a folder of class folders holds.

    Attributes:
        root: the folder.
        files: path and class name of every image, in a fixed order.
        skipped: files that are no images, by suffix.
    """

    root: Path
    files: tuple[tuple[Path, str], ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Class names, sorted as strings."""
        return sorted({name for _, name in self.files})


def natural_key(name: str) -> list[int | str]:
    """Sorts `2` before `10`, as timm's reader does."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def scan(root: Path) -> Scan:
    """Every image below `root`; a class is named by the folder that holds its files, as timm does.

    Raises:
        ValueError: no image, or two folders of one name in different places, which would become one class.
    """
    files, skipped, where = [], Counter(), {}
    for folder, inside, names in os.walk(root, followlinks=True):
        inside.sort()
        label = "" if folder == str(root) else os.path.basename(folder)
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if suffix not in SUFFIXES:
                if not name.startswith("."):
                    skipped[suffix or name] += 1
                continue
            if where.setdefault(label, folder) != folder:
                raise ValueError(
                    f"{where[label]} and {folder} are both called {label!r} and would become one class; rename one, "
                    "or give --class-map with a flat copy of the data"
                )
            files.append((Path(folder) / name, label))
    if not files:
        found = f"; it holds {_counted(skipped)}" if skipped else ""
        raise ValueError(f"data {str(root)!r}: no images found; expected FOLDER/<class>/<image>{found}")
    files.sort(key=lambda file: natural_key(str(file[0])))
    return Scan(root, tuple(files), dict(skipped))


def _counted(kinds: Mapping[str, int]) -> str:
    most = sorted(kinds.items(), key=lambda item: -item[1])[:5]
    return ", ".join(f"{count} × {suffix}" for suffix, count in most)


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of a data set's splits, by the names `train`, `validation`, `test`.

    Raises:
        ValueError: two folders claim to be one split.
    """
    found: dict[str, Path] = {}
    for child in sorted(p for p in root.iterdir() if p.is_dir()):
        for split, names in SPLITS.items():
            if child.name.lower() in names:
                if split in found:
                    raise ValueError(f"{found[split]} and {child} both claim to be the {split} images; rename one")
                found[split] = child
    return found


def split_folder(root: Path, split: str) -> Path | None:
    """Where the images of `split` (a name in `SPLITS`) lie; None where there are none.

    A folder without any split is one set of images: it trains, and it is evaluated by those who ask for it by name.

    Raises:
        ValueError: training images are asked of a data set that has splits but none to train on.
    """
    split = next((canonical for canonical, names in SPLITS.items() if split in (canonical, *names)), split)
    found = split_folders(root)
    if split in found:
        return found[split]
    if not found:
        return root
    if split == "train":
        names = ", ".join(f"{p.name}/" for p in found.values())
        raise ValueError(f"data {str(root)!r} has {names} but no train/; name the folder of training images itself")
    return None


def open_image(path: Path, mode: str) -> Image.Image:
    """An image in Pillow's `mode` (`L`, `RGB` or `RGBA`); 16-bit images are scaled to 8 bits, not clipped.

    Raises:
        BrokenImage: it cannot be decoded; names the file.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                deep = np.asarray(image).astype(np.int64)
                top = 65535 if image.mode != "I" or deep.max(initial=0) > 255 else 255
                image = Image.fromarray((deep.clip(0, top) * 255 // top).astype(np.uint8), "L")
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise BrokenImage(
            f"{path} cannot be read as an image ({' '.join(str(e).split())}); mend or remove it, or go on without "
            "such files with --skip-broken"
        ) from None


class ImageFiles(Dataset):
    """Images of a scan with their class numbers.

    Attributes:
        class_to_idx: number by class name.
        broken: files left out because they cannot be decoded.
        channels: of the images handed out: 1, 3 or 4.
    """

    def __init__(
        self,
        found: Scan,
        class_to_idx: Mapping[str, int],
        *,
        transform: Callable[[Image.Image], Any] | None = None,
        channels: int = 3,
        broken: Sequence[Path] = (),
    ) -> None:
        if channels not in MODES:
            raise ValueError(f"the model takes {channels} channels; image files are read with 1, 3 or 4")
        self.scan, self.class_to_idx, self.transform = found, dict(class_to_idx), transform
        self.channels, self.broken = channels, tuple(broken)
        without = set(self.broken)
        self.files = [(path, self.class_to_idx[name]) for path, name in found.files if path not in without]
        if not self.files:
            raise ValueError(f"data {str(found.root)!r}: none of {len(found.files)} image files can be read")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.files[index]
        image = open_image(path, MODES[self.channels])
        return image if self.transform is None else self.transform(image), label

    def summary(self) -> str:
        """A line: images read, files skipped by type, files broken."""
        said = [f"{len(self.files)} images of {len({label for _, label in self.files})} classes"]
        if self.scan.skipped:
            said.append(f"skipped {_counted(self.scan.skipped)}")
        if self.broken:
            names = ", ".join(str(p) for p in self.broken[:3])
            said.append(f"{len(self.broken)} broken left out: {names}{' …' if len(self.broken) > 3 else ''}")
        return f"{self.scan.root}: {'; '.join(said)}"


def find_broken(found: Scan, channels: int = 3) -> list[Path]:
    """Files that cannot be decoded, by decoding every one."""

    def broken(path: Path) -> Path | None:
        try:
            open_image(path, MODES[channels])
        except BrokenImage:
            return path
        return None

    with ThreadPoolExecutor() as threads:
        return [p for p in threads.map(broken, (path for path, _ in found.files)) if p is not None]
