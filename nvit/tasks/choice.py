"""Which task a run is about: the one that is named, or the one that a model tells."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import adapters
from .base import Task
from .classification import Classification
from .features import Features
from .registry import TASKS
from .segmentation import Segmentation


def of(name: str, model: nn.Module) -> Task:
    """The task called `name` for the outputs of `model`; where it is `auto`, the one that the model tells.

    Raises:
        ValueError: the model does not tell, or has not the outputs that the task is about.
    """
    outputs = adapters.classes(model)
    name = infer(model) if name == "auto" else name
    if (name == Segmentation.name) != (_said(model) == Segmentation.name):
        if name == Segmentation.name:
            raise ValueError(
                "task segmentation needs a model with a head for pixels, this one has none; nvit finetune --task "
                "segmentation puts one on it"
            )
        raise ValueError(f"task {name} is not this model's, whose head is for pixels; take --task segmentation")
    if outputs is None and name != Classification.name:
        raise ValueError(f"task {name} needs a model that says how many outputs it has, as timm's num_classes does")
    if name == Features.name and outputs:
        raise ValueError(
            f"task features is for models without a classifier, this one has {outputs} outputs; "
            "model.reset_classifier(0) takes it off"
        )
    if name != Features.name and outputs == 0:
        raise ValueError(f"task {name} needs a classifier, this model has none (num_classes 0); take --task features")
    if name == Classification.name and outputs == 1:
        raise ValueError("task classification needs 2 outputs, this model has 1; take --task regression or multilabel")
    return TASKS[name](outputs)


def settled(config: Any, model: nn.Module) -> Task:
    """The task of a recipe (`config.TrainingConfig` or a kind of it) for a prepared model, which from now on hands out
    the features that the recipe chooses, at the width it asks for.

    Raises:
        ValueError: as `of`, or the recipe asks for what the task or the model has not.
    """
    task = of(config.task, model)
    task.check(config)
    if task.name == Features.name:
        adapters.choose_features_(model, config.features)
        if getattr(config, "keep_output", False):
            adapters.keep_output_(model, config.features)
    return task


def infer(model: nn.Module) -> str:
    """The name of the task that a model tells by its config or its head.

    Raises:
        ValueError: it has one output and does not say what for.
    """
    said = _said(model)
    if said is not None:
        return said
    outputs = adapters.classes(model)
    if outputs == 1:
        raise ValueError(
            "the model has one output and does not say what for; take --task regression (a number) or --task "
            "multilabel (a yes or no)"
        )
    return Features.name if outputs == 0 else Classification.name


def _said(model: nn.Module) -> str | None:
    """The task that a model's own config or head names."""
    return adapters.of(model).task(model) if adapters.refusal(model) is None else None
