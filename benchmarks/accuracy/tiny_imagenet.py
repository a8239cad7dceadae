"""Tiny-ImageNet in memory: decoded once, augmented and resized on the device that trains; and DeiT-Ti made for it."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from torch import Tensor, nn

from benchmarks.accuracy.ablation_data import imagenet_model, imagenet_rows
from benchmarks.accuracy.library import MODEL
from nvit.utils.devices import sent

PACK, WEIGHTS, SYNSETS = "tiny_imagenet200.npz", f"{MODEL}.safetensors", "imagenet_synsets.txt"
MOST = 60 << 20
"""Bytes that may travel to a machine."""
SPLITS = ("train", "val")
PAD = 6
"""Pixels of 64 by which a training crop may be off."""


@dataclass(frozen=True)
class Images:
    """Decoded images.

    Attributes:
        pixels: uint8 `(images, 3, 64, 64)`.
        labels: int64 `(images,)`, numbers of `classes`.
        classes: WordNet names.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device), self.classes)

    def some(self, count: int) -> Images:
        """So many of every class alike, the first ones; all for 0."""
        each = count // len(self.classes)
        if not count or each * len(self.classes) >= len(self):
            return self
        return self._of_each(slice(each), count)

    def last(self, count: int) -> Images:
        """The same from the end of every class."""
        return self._of_each(slice(-(count // len(self.classes)), None), count)

    def _of_each(self, places: slice, count: int) -> Images:
        if count < len(self.classes):
            raise ValueError(f"{count} images are less than one of each of {len(self.classes)} classes; ask for more")
        keep = torch.cat([(self.labels == c).nonzero()[places, 0] for c in range(len(self.classes))])
        return Images(self.pixels[keep], self.labels[keep], self.classes)


def pack(folder: Path, path: Path) -> None:
    """Write the file that `read` takes from a folder `{train,val}/<class>/<image>`: JPEGs one after another, as they
    are, with where each begins (`<split>_off`) and its class (`<split>_y`)."""
    classes = sorted(p.name for p in (folder / "train").iterdir())
    parts = {"wnids": np.array(classes)}
    for split in SPLITS:
        files = [(i, f) for i, name in enumerate(classes) for f in sorted((folder / split / name).iterdir())]
        held = [f.read_bytes() for _, f in files]
        parts[f"{split}_jpeg"] = np.frombuffer(b"".join(held), np.uint8)
        parts[f"{split}_off"] = np.cumsum([0, *map(len, held)])
        parts[f"{split}_y"] = np.array([i for i, _ in files], np.uint8)
    np.savez_compressed(path, **parts)


def read(path: Path) -> dict[str, Images]:
    """Both splits of such a file, decoded by all processors; to be called before CUDA starts, since they are forks."""
    held = np.load(path)
    classes = tuple(str(name) for name in held["wnids"])
    found = {}
    for split in SPLITS:
        raw, at = held[f"{split}_jpeg"].tobytes(), held[f"{split}_off"]
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
            jpegs = (raw[a:b] for a, b in itertools.pairwise(at))
            pixels = torch.from_numpy(np.stack(list(pool.map(_decoded, jpegs, chunksize=500)))).permute(0, 3, 1, 2)
        found[split] = Images(pixels.contiguous(), torch.from_numpy(held[f"{split}_y"].astype(np.int64)), classes)
    return found


def _decoded(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def packed(root: Path, work: Path) -> Path:
    """The packed file: of `root` if it has one, else of `work`, packed there once from the folder of images."""
    if (root / PACK).exists():
        return root / PACK
    if not (work / PACK).exists():
        work.mkdir(parents=True, exist_ok=True)
        pack(root / "tiny_imagenet200", work / PACK)
    return work / PACK


class Batches:
    """Batches of images for a model, `(images, labels)`: normalised, brought to its size, augmented where asked for.

    Draws follow torch's seed, so that `nvit.finetune` gives the same ones at the same step. The last ragged batch of an
    epoch is left out while training.
    """

    def __init__(self, images: Images, size: int, batch_size: int, *, training: bool, augment: bool = True) -> None:
        self.images, self.size, self.batch_size = images, size, batch_size
        self.training, self.augment = training, training and augment
        device = images.pixels.device
        self.mean, self.std = (255 * torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))

    def __len__(self) -> int:
        n = len(self.images)
        return max(1, n // self.batch_size) if self.training else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, device = len(self.images), self.images.pixels.device
        order = sent(torch.randperm(n) if self.training else torch.arange(n), device)
        for b in range(len(self)):
            chosen = order[b * self.batch_size : (b + 1) * self.batch_size]
            x = self.images.pixels[chosen]
            yield self.ready(self.shifted(x) if self.augment else x), self.images.labels[chosen]

    def ready(self, pixels: Tensor) -> Tensor:
        """What a model takes, fp32 `(images, 3, size, size)`."""
        x = (pixels.float() - self.mean) / self.std
        return F.interpolate(x, self.size, mode="bicubic", antialias=False)

    def shifted(self, pixels: Tensor) -> Tensor:
        """Each image moved by up to `PAD` pixels, the edge repeated, and half of them mirrored."""
        n, side, device = len(pixels), pixels.shape[-1], pixels.device
        at = torch.arange(side, device=device)
        off = (sent(torch.randint(-PAD, PAD + 1, (n, 1)), device) for _ in range(2))  # while the last step still runs
        rows, columns = ((o + at).clamp(0, side - 1) for o in off)
        mirrored = sent(torch.rand(n, 1) < 0.5, device)
        columns = torch.where(mirrored, columns.flip(1), columns)
        which = torch.arange(n, device=device).view(n, 1, 1)
        return pixels.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def deit_tiny(root: Path, classes: Sequence[str], size: int) -> nn.Module:
    """DeiT-Ti for these of ImageNet's classes and images of `size` pixels, with its own weights; `root` as `luggage`
    leaves it, or with weights in fp32."""
    return imagenet_model(root, MODEL, size, imagenet_rows(root, classes))


def luggage(root: Path, folder: Path) -> int:
    """Write what another machine needs of `root`: 16-bit weights, the names of classes, the packed images. Returns the
    bytes of all that lies in `folder`, wheels that were put there as well.

    Raises:
        ValueError: more than `MOST`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.half() for name, t in load_file(root / WEIGHTS).items()}, folder / WEIGHTS)
    shutil.copyfile(root / SYNSETS, folder / SYNSETS)
    if (file := packed(root, folder)).parent != folder:
        shutil.copyfile(file, folder / PACK)
    total = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    if total >= MOST:
        raise ValueError(
            f"{folder} holds {total / 2**20:.1f} MiB, and less than {MOST >> 20} may travel; leave wheels out that are "
            "there already"
        )
    return total
