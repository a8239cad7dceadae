"""`nvit evaluate` of a tower without a classifier: what its features kept of the dense ones, and know of classes."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import adapters
from ..analysis.evaluate import accuracy
from ..analysis.neighbours import features_of, knn, linear_probe, percent
from ..training.data import evaluation_loader, subset, transform
from ..training.distill import frozen
from ..training.sides import labelled_sides
from ..utils.progress import Progress
from .flags import ModelFlags
from .flags.evaluate import EvaluateCommand
from .inputs import NO_DATA, open_evaluation_data
from .models import open_model
from .progress import say


def evaluate_tower(model: nn.Module, command: EvaluateCommand, progress: Progress) -> dict[str, Any]:
    """`cosine` to the reference, `knn` and `probe` in percent with their standard errors, as far as there is what they
    need; what is left out is said.

    Raises:
        ValueError: no images, or neither a reference nor labelled images on two sides.
    """
    flags, preprocess = command.images, adapters.preprocess(model)
    reference = None
    if command.reference:
        reference = frozen(open_model(command.reference, ModelFlags(), command.machine.pick()))
        if adapters.classes(reference) != 0:
            raise ValueError(f"--reference is a classifier; {command.reference} is to be a tower as MODEL is")
    for tower in (model, reference):
        if tower is not None:
            adapters.choose_features_(tower, command.features)
    if not (flags.data or flags.eval_data):
        raise ValueError(NO_DATA)
    sides = labelled_sides(
        flags.data,
        flags.eval_data,
        transform=transform(preprocess, resize=flags.resize),
        channels=preprocess["input_size"][0],
        skip_broken=flags.skip_broken,
        say=say,
    )
    found: dict[str, Any] = {}
    if sides is not None:
        known, asked = sides[0], subset(sides[1], flags.eval_images)
        loaders = [evaluation_loader(side, command.batch_size, flags.processes()) for side in (known, asked)]
        found = _classes_told(model, *loaders, progress)
    if reference is None and sides is not None:
        say("the cosine is left out: --reference names no dense model")
        return found | {"images": len(asked)}
    images = loaders[1] if sides is not None else open_evaluation_data(model, flags, command.batch_size, command.task)
    if images is None:
        raise ValueError(NO_DATA)
    return found | accuracy(
        model,
        images,
        task="features",
        reference=reference,
        amp=command.amp,
        compile=command.compile,
        progress=progress,
    )


def _classes_told(model: nn.Module, known: Any, asked: Any, progress: Progress) -> dict[str, float]:
    """Of k-NN, and of a linear probe where scikit-learn is installed."""
    banks = [
        features_of(model, loader, progress, f"evaluate: features of {name} images")
        for name, loader in (("known", known), ("asked", asked))
    ]
    top1, off = percent(knn(*banks))
    found = {"knn": top1, "knn_se": off}
    try:
        top1, off = percent(linear_probe(*banks))
    except ModuleNotFoundError as e:
        say(f"left out: {e}")
        return found
    return found | {"probe": top1, "probe_se": off}
