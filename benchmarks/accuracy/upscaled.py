"""Images of another kind than those that calibrate: Tiny-ImageNet's 64 pixels made as large as a model wants them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

import nvit
from benchmarks.accuracy.library import BATCH

EVERY = 5


class Tiny:
    """Tiny-ImageNet's validation images, and which outputs of an ImageNet classifier stand for its classes."""

    def __init__(self, data: Path) -> None:
        self.files = ImageFolder(str(data / "tiny_imagenet200" / "val"))
        synsets = (data / "imagenet_synsets.txt").read_text().split()
        self.outputs = torch.tensor([synsets.index(name) for name in self.files.classes])

    def batches(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        transform = nvit.data.transform(resolve_data_config(model=model))
        chosen = range(0, len(self.files), EVERY)
        for start in range(0, len(chosen), BATCH):
            pairs = [self.files[i] for i in chosen[start : start + BATCH]]
            yield torch.stack([transform(image) for image, _ in pairs]), torch.tensor([label for _, label in pairs])

    @torch.inference_mode()
    def right(self, model: nn.Module) -> Tensor:
        """Right or wrong by image, float `(images,)`."""
        model.eval()
        return torch.cat([(model(x)[:, self.outputs].argmax(-1) == y).float() for x, y in self.batches(model)])
