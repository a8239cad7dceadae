"""Tiny-ImageNet in memory, DeiT-Ti at another image size with a head of those classes, ViT-Ti's hard labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.accuracy.library import MODEL
from nvit import adapters

TEACHER = "vit_tiny_patch16_224"


class Pixels(Dataset):
    """Decoded images of a folder of class folders, so many of each, and class numbers in the folders' order.

    Args:
        each: images of a class, from the one at place `first` on.
        config: timm's data config: size, mean and deviation.
    """

    def __init__(self, folder: Path, each: int, config: dict, first: int = 0) -> None:
        size = config["input_size"][-1]
        classes = sorted(p for p in folder.iterdir() if p.is_dir())
        files = [(f, i) for i, c in enumerate(classes) for f in sorted(c.iterdir())[first : first + each]]
        self.names, self.labels = [c.name for c in classes], [i for _, i in files]
        self.pixels = np.stack([self._decoded(f, size) for f, _ in files])
        self.mean, self.std = (torch.tensor(config[k]).view(3, 1, 1) for k in ("mean", "std"))

    @staticmethod
    def _decoded(file: Path, size: int) -> np.ndarray:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x = torch.from_numpy(self.pixels[i]).permute(2, 0, 1).float() / 255
        return (x - self.mean) / self.std, self.labels[i]


def imagenet_rows(root: Path, wnids: Sequence[str]) -> list[int]:
    """Where these classes stand in an ImageNet classifier."""
    order = [line.split()[0] for line in (root / "imagenet_synsets.txt").read_text().splitlines() if line.strip()]
    return [order.index(n) for n in wnids]


def imagenet_model(root: Path, name: str, size: int, classes: Sequence[int]) -> nn.Module:
    """A trained model of timm whose head answers for these of ImageNet's classes; positions resampled to a size."""
    model = timm.create_model(name).eval()
    model.load_state_dict(load_file(root / f"{name}.safetensors"))
    model.set_input_size((size, size))
    head = nn.Linear(model.embed_dim, len(classes))
    head.load_state_dict({n: p.data[list(classes)] for n, p in model.head.named_parameters()})
    model.head, model.num_classes = head, len(classes)
    return model


def config_of(size: int, name: str = MODEL) -> dict:
    """timm's data config of a model at an image size."""
    return resolve_data_config(model=timm.create_model(name)) | {"input_size": (3, size, size)}


class HardLabels(nn.Module):
    """A classifier whose answer to an image is remembered, since the same images come in every run.

    Args:
        size: of the images that it takes; they are resized to it.
    """

    def __init__(self, model: nn.Module, size: int, file: Path | None = None) -> None:
        super().__init__()
        self.model, self.size, self.file = model.eval().requires_grad_(False), size, file
        self.known: dict[int, int] = {}
        if file is not None and file.exists():
            held = load_file(file)
            self.known = dict(zip(held["image"].tolist(), held["label"].tolist(), strict=True))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """1 for the answer and 0 elsewhere, `(images, classes)`."""
        keys = [_key(x) for x in images.cpu()]
        new = [i for i, key in enumerate(keys) if key not in self.known]
        if new:
            shown = nn.functional.interpolate(images[new].float(), size=self.size, mode="bicubic", antialias=True)
            answers = self.model(shown).argmax(-1).tolist()
            self.known |= dict(zip((keys[i] for i in new), answers, strict=True))
        labels = torch.tensor([self.known[key] for key in keys], device=images.device)
        return nn.functional.one_hot(labels, adapters.classes(self.model)).float()

    def keep(self) -> None:
        """Write what is remembered."""
        if self.file is not None and self.known:
            pairs = zip(*self.known.items(), strict=True)
            save_file({name: torch.tensor(v) for name, v in zip(("image", "label"), pairs, strict=True)}, self.file)


def _key(x: Tensor) -> int:
    digest = hashlib.blake2b(x.contiguous().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
