"""Images without labels: a folder that holds them directly, or a file that lists their paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .folders import SUFFIXES, ImageFiles, Scan, scan, split_folder, split_folders


class UnlabelledImages(ImageFiles):
    """The images of a scan alone, without a label."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[0]

    def summary(self) -> str:
        return super().summary().replace(" of 1 classes", " without labels")


def without_labels(where: str) -> Scan | None:
    """The images of a flat folder, or of the folder of its training images if that is flat, or of a list; None of
    everything else: class folders, data set names.

    Raises:
        ValueError: a list names a file that is not there, or none.
    """
    path = Path(where)
    if path.is_file():
        return _listed(path)
    if not path.is_dir():
        return None
    if (splits := split_folders(path)) and "train" not in splits:
        return None  # images to evaluate alone, which have labels; whoever trains on them is told
    folder = split_folder(path, "train")
    return scan(folder) if _is_flat(folder) else None


def _is_flat(folder: Path) -> bool:
    entries = list(folder.iterdir())
    return any(e.suffix.lower() in SUFFIXES and e.is_file() for e in entries) and not any(e.is_dir() for e in entries)


def _listed(path: Path) -> Scan:
    """The files of a list, a path a line, from the list's own folder where it is relative."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"data {str(path)!r} is a file but not a list of image paths, one a line") from None
    files = [path.parent / line for line in lines if line and not line.startswith("#")]
    if not files:
        raise ValueError(f"data {str(path)!r} lists no image; expected a path a line")
    if (gone := next((f for f in files if not f.is_file()), None)) is not None:
        raise ValueError(f"data {str(path)!r} lists {str(gone)!r}, which does not exist")
    return Scan(path, tuple((f, "") for f in files))
