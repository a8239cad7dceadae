"""The images of a run: which folders they lie in and which class numbers they have, decided once for all its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from .. import adapters, parallel
from ..config import PruneConfig, TrainingConfig
from .data import TrainingData, calibration_data, evaluation_loader, open_images, spread, subset, transform
from .digits import Digits
from .folders import ImageFiles, find_broken, scan, split_folder
from .labels import WITNESSED, Numbering, ask, mapped, numberings, read_class_map
from .unlabelled import UnlabelledImages, without_labels


@dataclass(frozen=True, kw_only=True)
class Labels:
    """How class numbers are found.

    Attributes:
        class_map: a file with a class folder's name a line, in index order; it settles the numbers.
        order: `auto`, `lexical` or `natural`, of class folders that the model has no names for.
        accept: go on where the dense model cannot tell whether labels fit it.
        witness: ask the model on a few hundred images: `always`, `order` (where two orders are possible), `never` (its
            weights are new and know nothing).
    """

    class_map: str = ""
    order: str = "auto"
    accept: bool = False
    witness: str = "order"


class Images:
    """Training and evaluation images of one model.

    Args:
        where, evaluation: as `data.open_images` takes them; `where` has both where `evaluation` is empty. On images
            without labels (`unlabelled.without_labels`) runs that read none can be calibrated.
        resize: before the centre crop.
        skip_broken: leave out files that cannot be decoded.
        say: called with a line wherever something was decided or left out.
    """

    def __init__(
        self,
        model: nn.Module,
        where: str,
        evaluation: str = "",
        *,
        labels: Labels | None = None,
        resize: bool = True,
        skip_broken: bool = False,
        workers: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self.where, self.evaluated = model, where, evaluation
        self.labels = labels or Labels()
        self.resize, self.skip_broken, self.workers, self.say = resize, skip_broken, workers, say
        self.preprocess, self.classes = adapters.preprocess(model), adapters.classes(model)
        self.channels = self.preprocess["input_size"][0]
        self._numbering: Numbering | None = None
        self.unlabelled = without_labels(where)

    def training(self, config: TrainingConfig, *, augment: bool = True) -> TrainingData:
        """Shuffled training batches, as large, ordered and augmented as the config says.

        Raises:
            ValueError: the images have no labels.
        """
        if self.unlabelled is not None:
            raise self._no_labels("training reads labels")
        pipeline = transform(self.preprocess, resize=self.resize, training=config if augment else None)
        dataset = self._open(self.where, "train", pipeline)
        repeats = config.repeats if augment else 1
        return TrainingData(dataset, config.batch_size, config.seed, self.workers, repeats)

    def calibration(self, config: PruneConfig) -> TrainingData:
        """What a run without training reads: `config.images` of the training images, spread over their classes, every
        one of them; or shuffled training batches where it counts batches. Images alone where they have no labels.

        Raises:
            ValueError: they have none, and the run reads some.
        """
        pipeline = transform(self.preprocess, resize=self.resize)
        if self.unlabelled is None:
            dataset = self._open(self.where, "train", pipeline)
        elif config.over_ranks(parallel.world()).reads_labels:
            finetuned = "finetuning" if config.finetune_epochs else f"criterion {config.saliency}"
            raise self._no_labels("training reads labels" if config.train else f"{finetuned} reads labels")
        else:
            dataset = self._without_labels(pipeline)
        return calibration_data(dataset, config, self.workers)

    def _without_labels(self, pipeline: Callable) -> UnlabelledImages:
        broken = find_broken(self.unlabelled, self.channels) if self.skip_broken else ()
        dataset = UnlabelledImages(self.unlabelled, {"": 0}, transform=pipeline, channels=self.channels, broken=broken)
        self.say(f"{dataset.summary()}: no accuracy on them is reported")
        return dataset

    def _no_labels(self, why: str) -> ValueError:
        return ValueError(
            f"data {self.where!r} holds images without labels, but {why}; give class folders, or prune with --no-train "
            "and a criterion that reads none (auto, without finetuning), or with --labels sampled"
        )

    def evaluation(self, batch_size: int, count: int = 0, *, own: bool = False) -> DataLoader | None:
        """Evaluation batches, in order; None, and a line that says so, where there are no images but those that train.

        Args:
            count: so many images evenly over the set; 0 for all.
            own: a folder without splits is evaluated itself: nothing trains on it.
        """
        where = self.evaluated or self.where
        if not self.evaluated and self.unlabelled is not None:
            return None  # said where they are opened
        unsplit = Path(where).is_dir() and split_folder(Path(where), "validation") == Path(where)
        dataset = None
        if where and (own or self.evaluated or not unsplit):
            dataset = self._open(where, "validation", transform(self.preprocess, resize=self.resize))
        if dataset is None:
            if where:
                self.say(f"{where} has no val/: accuracy is not reported; name evaluation images with --eval-data")
            return None
        return evaluation_loader(subset(dataset, count), batch_size, self.workers)

    def _open(self, where: str, split: str, pipeline: Callable) -> Dataset | None:
        numbering = self.numbering() if Path(where).is_dir() else None
        dataset = open_images(
            where,
            split,
            classes=self.classes,
            transform=pipeline,
            class_map=self.labels.class_map,
            numbering=None if numbering is None else numbering.class_to_idx,
            channels=self.channels,
            skip_broken=self.skip_broken,
        )
        if isinstance(dataset, ImageFiles) and (dataset.broken or dataset.scan.skipped):
            self.say(dataset.summary())
        return dataset

    def numbering(self) -> Numbering:
        """Class numbers by folder name, the same for training and evaluation; rank 0 decides for all.

        Raises:
            ValueError: they cannot be found, or the model says that they do not fit it.
        """
        if self._numbering is None:
            self._numbering, said = parallel.from_main(self._decide)
            if said:
                self.say(said)
        return self._numbering

    def _decide(self) -> tuple[Numbering, str]:
        folder = self._named_by()
        found = scan(folder)
        if self.labels.class_map:
            path = self.labels.class_map
            return mapped(found.names, read_class_map(path), path, self.classes), ""
        own = adapters.label_names(self.model)
        candidates = numberings(found.names, self.classes, model_names=own, order=self.labels.order)
        needed = {"always": True, "order": len(candidates) > 1, "never": False}[self.labels.witness]
        if not needed:
            return candidates[0], "" if len(candidates) == 1 else f"labels by {candidates[0].how}"
        places = {name: i for i, name in enumerate(found.names)}
        pipeline = transform(self.preprocess, resize=self.resize)
        every = ImageFiles(found, places, transform=pipeline, channels=self.channels)
        few = evaluation_loader(Subset(every, spread(len(every), WITNESSED)), 32, self.workers)
        return ask(self.model, found.names, candidates, few, self.classes, accept=self.labels.accept)

    def _named_by(self) -> Path:
        """The folder whose class folders are numbered: the training images', else the evaluation images'."""
        for where, split in ((self.where, "train"), (self.evaluated, "validation")):
            if where and Path(where).is_dir() and not (where == self.where and self.unlabelled is not None):
                try:
                    folder = split_folder(Path(where), split)
                except ValueError:
                    folder = split_folder(Path(where), "validation")
                if folder is not None:
                    return folder
        return Path(self.evaluated or self.where)


class DigitImages:
    """The bundled digits, for the bundled model, with the methods of `Images`."""

    unlabelled = None

    def training(self, config: TrainingConfig, *, augment: bool = True) -> TrainingData:
        dataset = Digits(training=True, augment=augment)
        return TrainingData(dataset, config.batch_size, config.seed, repeats=config.repeats if augment else 1)

    def calibration(self, config: PruneConfig) -> TrainingData:
        return calibration_data(Digits(training=True), config)

    def evaluation(self, batch_size: int, count: int = 0, *, own: bool = False) -> DataLoader:
        return evaluation_loader(subset(Digits(training=False), count), batch_size)


def image_folder(
    folder: str,
    model: nn.Module,
    batch_size: int,
    *,
    split: str = "train",
    class_map: str = "",
    class_order: str = "auto",
    accept_labels: bool = False,
    skip_broken: bool = False,
    resize: bool = True,
    seed: int = 0,
    workers: int = 0,
) -> TrainingData:
    """Shuffled batches from a folder of class folders, preprocessed as `model` wants, without augmentation.

    Class numbers are the model's own where it has names for its classes; where two orders of the folders are possible
    (0, 1, 10, 2 or 0, 1, 2, 10), the model is asked on a few hundred images which one is its own. A flat folder, or a
    file with an image's path a line, gives batches of images alone, for runs that read no labels.

    Args:
        folder: with or without folders of splits.
        split: `train` or `validation`.

    Raises:
        ValueError: no such folder, no images, or classes that do not fit the model.

    >>> for i in range(10):
    ...     folder = Path(f"digits/train/{i}")
    ...     folder.mkdir(parents=True)
    ...     PIL.Image.new("L", (8, 8), i).save(folder / "0.png")
    >>> loader = nvit.image_folder("digits", nvit.load(nvit.BUNDLED), batch_size=5, accept_labels=True)
    >>> [images.shape for images, labels in loader]
    [torch.Size([5, 1, 8, 8]), torch.Size([5, 1, 8, 8])]
    """
    inside = Path(folder)
    if inside.is_dir():
        inside = split_folder(inside, split)
    elif not inside.is_file():
        raise ValueError(f"data {folder!r}: no such folder")
    if inside is None:
        raise ValueError(f"data {folder!r} has no folder of {split} images")
    labels = Labels(class_map=class_map, order=class_order, accept=accept_labels)
    images = Images(model, str(inside), labels=labels, resize=resize, skip_broken=skip_broken, workers=workers)
    if images.unlabelled is not None:
        return TrainingData(
            images._without_labels(transform(images.preprocess, resize=resize)), batch_size, seed, workers
        )
    return images.training(TrainingConfig(batch_size=batch_size, seed=seed), augment=False)
