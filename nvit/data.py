"""Images and loaders, under the name that users import: `nvit.training.data`."""

from .training.data import TrainingData, evaluation_loader, open_images, seed_draws, shares, transform
from .training.digits import Digits
from .training.images import image_folder

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
