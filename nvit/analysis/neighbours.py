"""What a tower's features know of classes: the nearest labelled images (k-NN), and a linear classifier on top."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .. import adapters
from ..tasks.classification import standard_error
from ..tasks.features import Cosine
from ..training.batches import Loader, known_length, parts
from ..utils.progress import Progress, silent

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Of the k-NN of DINO (arXiv:2104.14294, Sec. 4.1)."""


@dataclass(frozen=True)
class Bank:
    """Features `(images, width)` fp32 and class numbers `(images,)` of a set of images, on the CPU."""

    features: Tensor
    labels: Tensor


@torch.inference_mode()
def features_of(model: nn.Module, loader: Loader, progress: Progress = silent, stage: str = "features") -> Bank:
    """The features of every image of a labelled set; those of several tokens as their mean.

    Raises:
        ValueError: the loader gives no image, or none with class numbers.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    features, labels, total = [], [], known_length(loader) or 0
    for i, batch in enumerate(loader):
        images, y = parts(batch)
        if y is None or y.dim() != 1 or y.is_floating_point():
            raise ValueError("k-NN and a linear probe need a class number an image; give a folder of class folders")
        found = adapters.predict(model, images.to(device)).float()
        features.append((found.mean(1) if found.dim() == 3 else found).cpu())
        labels.append(y.cpu().long())
        progress(i + 1, total, stage)
    model.train(was_training)
    if not features:
        raise ValueError("the loader gave no image; it needs at least one")
    return Bank(torch.cat(features), torch.cat(labels))


def knn(bank: Bank, asked: Bank, k: int = NEIGHBOURS, tau: float = TEMPERATURE) -> Tensor:
    """Right or wrong by image, bool `(images,)`, of a vote of the `k` images of the bank with the largest cosine, each
    with the weight `exp(cosine / tau)` (arXiv:2104.14294)."""
    known, classes = normalize(bank.features, dim=-1), int(bank.labels.max()) + 1
    right = []
    for features, labels in zip(asked.features.split(256), asked.labels.split(256), strict=True):
        near, at = (normalize(features, dim=-1) @ known.T).topk(min(k, len(known)))
        votes = near.new_zeros(len(near), classes).scatter_add_(1, bank.labels[at], (near / tau).exp())
        right.append(votes.argmax(1) == labels)
    return torch.cat(right)


def linear_probe(bank: Bank, asked: Bank, penalty: float = 1.0, iterations: int = 200) -> Tensor:
    """Right or wrong by image, bool `(images,)`, of a logistic regression on features of length 1, each channel brought
    to unit variance.

    Args:
        penalty: C of scikit-learn, the inverse strength of the L2 penalty.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: the bank has one class alone.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError:
        raise ModuleNotFoundError("a linear probe needs scikit-learn: pip install 'nvit[probe]'") from None
    if len(bank.labels.unique()) < 2:
        raise ValueError("a linear probe needs two classes at least; the training images have one")
    x, queries = normalize(bank.features, dim=-1), normalize(asked.features, dim=-1)
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-8)
    probe = LogisticRegression(C=penalty, max_iter=iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # accuracy has settled long before the last digit
        probe.fit(((x - mean) / spread).numpy(), bank.labels.numpy())
    found = torch.from_numpy(probe.predict(((queries - mean) / spread).numpy()))
    return found == asked.labels


def cosine(ours: Bank, dense: Bank) -> float:
    """Mean cosine of two models' features of the same images.

    Raises:
        ValueError: they have other widths or images.
    """
    meter = Cosine()
    meter.add(ours.features, dense.features)
    return meter.value()["cosine"]


def percent(right: Tensor) -> tuple[float, float]:
    """Top-1 of answers right or wrong `(images,)`, and its standard error in points."""
    top1 = 100 * float(right.float().mean())
    return top1, standard_error(top1, len(right))
