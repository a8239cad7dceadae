"""Images and loaders, under the name that users import: `nvit.training.data`."""

from .training.data import (
    Digits,
    TrainingData,
    evaluation_loader,
    image_folder,
    open_images,
    seed_draws,
    shares,
    transform,
)

__all__ = [
    "Digits",
    "TrainingData",
    "evaluation_loader",
    "image_folder",
    "open_images",
    "seed_draws",
    "shares",
    "transform",
]
