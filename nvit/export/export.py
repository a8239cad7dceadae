"""A compact model as files of other runtimes, each checked in its own before any is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import adapters
from ..utils.files import part_of
from ..utils.progress import Progress, silent
from .base import EXTERNAL_BYTES, OPSET, Format, Program
from .check import BATCHES, difference
from .program import Exportable, exportable, read
from .registry import formats

NAME = "model"
"""Of a file, before its format's suffix."""


@dataclass(frozen=True)
class Written:
    """A file that was checked and written.

    Attributes:
        format, runtime: by name.
        path: of the file; `files` are all that belong to it, by name.
        bytes: of all of them.
        difference: largest difference of outputs from the model's, as a share of the largest output.
        batches: images a batch that it was checked at.
    """

    format: str
    runtime: str
    path: str
    files: tuple[str, ...]
    bytes: int
    difference: float
    batches: tuple[int, ...]


def seeded_images(model: nn.Module, count: int) -> Tensor:
    """Standard normal images of the model's input size, where there are no real ones."""
    size = adapters.preprocess(model)["input_size"]
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def images_wanted(static: int = 0) -> int:
    """How many images a check takes."""
    return 2 * static if static else sum(BATCHES)


def export(
    model: nn.Module,
    folder: str | Path,
    names: Sequence[str] = ("onnx",),
    *,
    images: Tensor | None = None,
    static: int = 0,
    opset: int = OPSET,
    dtype: str = "float32",
    external_bytes: int = EXTERNAL_BYTES,
    threads: int = 1,
    progress: Progress = silent,
) -> list[Written]:
    """Write a dense or compact model in these formats, once all of them compute what it does.

    Every file is written beside `folder`, opened by its own runtime and compared with the model at two batch sizes;
    then all are moved into `folder` together. The model is left as it is.

    Args:
        names: of `registry.FORMATS`.
        images: normalised, to compare outputs on, `images_wanted(static)` of them; seeded noise when None.
        static: the batch of a file that takes no other; 0 for any.
        external_bytes: an ONNX model with more bytes of weights has them in a file of its own.

    Raises:
        ValueError: a format that is not here or needs what is not installed, a model that cannot be exported, too few
            images, or a file that computes something else.

    >>> model = nvit.load(nvit.BUNDLED)
    >>> from nvit.export.export import export
    >>> [file] = export(model, "exported", ["torch"])
    >>> file.files, file.batches, file.difference < 1e-4
    (('model.pt2',), (1, 3), True)
    """
    folder, found = Path(folder), formats(names)
    for form in found:
        if dtype not in form.dtypes:
            raise ValueError(f"format {form.name} has no {dtype} here; expected one of {', '.join(form.dtypes)}")
    copied = exportable(model, getattr(torch, dtype))
    batches = _batches(seeded_images(model, images_wanted(static)) if images is None else images, static, dtype)
    program = Program(read(copied, batches[-1], bool(static)), opset, external_bytes)
    with _part_folder(folder) as part:
        rows = []
        for i, form in enumerate(found):
            progress(i, len(found), f"exporting {form.name}")
            rows.append(_write(form, program, copied, batches, part / f"{NAME}{form.suffix}", folder, threads))
        progress(len(found), len(found), "exporting")
        folder.mkdir(parents=True, exist_ok=True)
        for row in rows:
            for name in reversed(row.files):  # what a file refers to is there before it
                os.replace(part / name, folder / name)
    return rows


def _batches(images: Tensor, static: int, dtype: str) -> list[Tensor]:
    if len(images) < (wanted := images_wanted(static)):
        raise ValueError(f"{len(images)} images are too few to compare outputs on; {wanted} are needed")
    images = images.to("cpu", getattr(torch, dtype))
    return list(images[:wanted].split((static, static) if static else BATCHES))


def _write(
    form: Format,
    program: Program,
    model: Exportable,
    batches: Sequence[Tensor],
    path: Path,
    folder: Path,
    threads: int,
) -> Written:
    before = set(os.listdir(path.parent))
    form.write(program, path)
    off = difference(path.name, form.open(path, threads), model, batches)
    files = [path.name, *sorted(set(os.listdir(path.parent)) - before - {path.name})]
    size = sum((path.parent / name).stat().st_size for name in files)
    sizes = tuple(sorted({len(images) for images in batches}))
    return Written(form.name, form.version(), str(folder / path.name), tuple(files), size, off, sizes)


@contextmanager
def _part_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, on the same disk; gone afterwards."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(folder.absolute())
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
