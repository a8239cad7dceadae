"""The bundled digits."""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

DIGITS_EVAL = 360
"""So many of the bundled digits, drawn once and for all, are for evaluation."""


class Digits(Dataset):
    """The bundled 8 × 8 digits (UCI, Alpaydin & Kaynak 1998, CC BY 4.0): float `(1, 8, 8)` in [-1, 1] and the digit.

    >>> image, label = nvit.data.Digits(training=True)[0]
    >>> image.shape
    torch.Size([1, 8, 8])
    """

    def __init__(self, training: bool, augment: bool = False) -> None:
        with resources.files("nvit").joinpath("bundled/digits.npz").open("rb") as f:
            pack = np.load(f)
            images, labels = pack["images"], pack["labels"]
        # The file is in the order of its writers; both parts should hold all of them.
        order = np.random.default_rng(0).permutation(len(labels))
        part = order[DIGITS_EVAL:] if training else order[:DIGITS_EVAL]
        self.images = torch.from_numpy(images[part]).float().div(8).sub(1)[:, None]
        self.labels = torch.from_numpy(labels[part]).long()
        self.classes = 10
        # Shifts by a pixel: an 8 x 8 digit has no room for more.
        self.shift = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if self.shift:
            dy, dx = (int(torch.randint(-1, 2, ())) for _ in range(2))
            padded = torch.nn.functional.pad(image, (1, 1, 1, 1), value=-1.0)
            image = padded[:, 1 + dy : 9 + dy, 1 + dx : 9 + dx]
        return image, self.labels[index]
