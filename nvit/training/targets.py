"""Images with numbers in place of classes: a folder, and a table that names its files. And images with nothing."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .. import adapters
from ..config import PruneConfig, TrainingConfig
from .data import TrainingData, calibration_data, evaluation_loader, subset, transform
from .folders import MODES, SUFFIXES, Scan, find_broken, natural_key, open_image, split_folder


def read_targets(path: str | Path, root: Path, outputs: int) -> tuple[list[Path], Tensor]:
    """Image files below `root`, and what a table says of each.

    Args:
        path: a CSV file whose first line names its columns: the file, as a path below `root`, then one for each output.

    Returns:
        The files in the table's order, and fp32 `(files, outputs)`.

    Raises:
        ValueError: no such table, or a line that does not fit, by its number.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"targets {path} does not exist")
    files, rows = [], []
    with path.open(newline="", encoding="utf-8") as lines:
        reader = csv.reader(lines)
        head = next(reader, [])
        if len(head) != 1 + outputs:
            raise ValueError(
                f"targets {path} has {len(head)} columns ({', '.join(head[:4])}{' …' if len(head) > 4 else ''}); "
                f"expected the file and one for each of the model's {outputs} outputs, with a line of their names first"
            )
        for row in (r for r in reader if r):
            where = f"targets {path} line {reader.line_num}"
            if len(row) != len(head):
                raise ValueError(f"{where} has {len(row)} columns, its first line {len(head)}")
            try:
                rows.append([float(cell) for cell in row[1:]])
            except ValueError:
                raise ValueError(f"{where}: {', '.join(row[1:5])} are not all numbers") from None
            if not (root / row[0]).is_file():
                raise ValueError(f"{where}: there is no file {root / row[0]}")
            files.append(root / row[0])
    if not files:
        raise ValueError(f"targets {path} lists no image")
    if len(set(files)) < len(files):
        twice = next(f for i, f in enumerate(files) if f in files[:i])
        raise ValueError(f"targets {path} lists {twice} twice")
    return files, torch.tensor(rows, dtype=torch.float32)


class FilesWithTargets(Dataset):
    """Images of files, each with its row of `targets` `(files, outputs)`."""

    def __init__(self, files: Sequence[Path], targets: Tensor, pipeline: Callable, channels: int) -> None:
        self.files, self.targets, self.pipeline, self.mode = list(files), targets, pipeline, MODES[channels]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self.pipeline(open_image(self.files[index], self.mode)), self.targets[index]


@dataclass(frozen=True, kw_only=True)
class TargetImages:
    """Training and evaluation images of one model whose labels are no classes, with the methods of `Images`.

    Attributes:
        where, evaluated: folders; evaluation images are `where`'s val/ if it has one, or below `where` too if they have
            a table of their own.
        targets, evaluated_targets: tables as `read_targets` reads them; none where no labels are read.
        resize: before the centre crop.
        skip_broken: leave out files that cannot be decoded.
        say: called with a line wherever something was decided or left out.
    """

    model: nn.Module
    where: str
    evaluated: str = ""
    targets: str = ""
    evaluated_targets: str = ""
    labelled: bool = True
    resize: bool = True
    skip_broken: bool = False
    workers: int = 0
    say: Callable[[str], None] = lambda line: None
    unlabelled: ClassVar[None] = None

    def training(self, config: TrainingConfig, *, augment: bool = True) -> TrainingData:
        """Shuffled training batches, as large, ordered and augmented as the config says."""
        pipeline = transform(self._preprocess, resize=self.resize, training=config if augment else None)
        dataset = self._open(self.where, "train", self.targets, pipeline)
        repeats = config.repeats if augment else 1
        return TrainingData(dataset, config.batch_size, config.seed, self.workers, repeats)

    def calibration(self, config: PruneConfig) -> TrainingData:
        """What a run without training reads: `config.images` of the training images, evenly over them."""
        pipeline = transform(self._preprocess, resize=self.resize)
        return calibration_data(self._open(self.where, "train", self.targets, pipeline), config, self.workers)

    def evaluation(self, batch_size: int, count: int = 0, *, own: bool = False) -> DataLoader | None:
        """Evaluation batches, in order; None, and a line that says so, where there are no images but those that train.

        Args:
            count: so many images evenly over the set; 0 for all.
            own: what would train is evaluated where there is nothing else: nothing trains on it.
        """
        where, table = self.evaluated or self.where, self.evaluated_targets
        if not table and (own or self.evaluated):
            table = self.targets
        unsplit = Path(where).is_dir() and split_folder(Path(where), "validation") == Path(where)
        missing = self.labelled and not table
        if missing or not (own or self.evaluated or self.evaluated_targets or not unsplit):
            self.say("nothing is evaluated: name images with --eval-data" + " and --eval-targets" * self.labelled)
            return None
        pipeline = transform(self._preprocess, resize=self.resize)
        return evaluation_loader(
            subset(self._open(where, "validation", table, pipeline), count), batch_size, self.workers
        )

    @property
    def _preprocess(self) -> dict[str, Any]:
        return adapters.preprocess(self.model)

    def _open(self, where: str, split: str, table: str, pipeline: Callable) -> Dataset:
        channels = self._preprocess["input_size"][0]
        root = Path(where)
        if not root.is_dir():
            raise ValueError(f"data {where!r}: no such folder; expected one of image files")
        if self.labelled:
            if not table:
                raise ValueError("--targets is missing: a CSV file that says for each image file what its outputs are")
            files, targets = read_targets(table, root, adapters.classes(self.model))
            self.say(f"{table}: {len(files)} images below {where}")
            return self._readable(files, targets, pipeline, channels)
        folder = split_folder(root, split)
        if folder is None:
            raise ValueError(f"data {where!r} has no {split} images")
        files = sorted(
            (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES), key=lambda p: natural_key(str(p))
        )
        if not files:
            raise ValueError(f"data {str(folder)!r}: no images found")
        self.say(f"{folder}: {len(files)} images, without labels")
        return self._readable(files, torch.zeros(len(files), 0), pipeline, channels)

    def _readable(self, files: list[Path], targets: Tensor, pipeline: Callable, channels: int) -> Dataset:
        """These images, less those that cannot be decoded where that was asked for."""
        if self.skip_broken:
            broken = set(find_broken(Scan(Path(self.where), tuple((file, "") for file in files)), channels))
            kept = [i for i, file in enumerate(files) if file not in broken]
            if broken:
                self.say(f"{len(broken)} broken left out: {', '.join(str(p) for p in sorted(broken)[:3])}")
            if not kept:
                raise ValueError(f"data {self.where!r}: none of {len(files)} image files can be read")
            files, targets = [files[i] for i in kept], targets[kept]
        return FilesWithTargets(files, targets, pipeline, channels)
