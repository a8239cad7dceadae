"""What an adapter is: the contract between a model family and the engine.

Nothing outside this package knows a host's attribute names; the engine asks the methods of `Adapter` and no others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from ..spec import BUNDLE_SIZES, BlockWidths, Group, Part, ViTSpec
from .tower import KEEP_OUTPUT, chosen, picked, restored_width

Piece = tuple[Callable[[Tensor], Tensor], tuple[int, ...]]
"""A piece of a model as a function, and the shape of its input without the batch."""


class Logits(NamedTuple):
    """What a classifier says of a batch.

    Attributes:
        cls: of the class token (or of whatever is pooled), `(batch, classes)`.
        dist: of the distillation token, `(batch, classes)`; None of a model that has none.

    >>> answer = nvit.adapters.Logits(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    >>> answer.mean
    tensor([[1., 0.]])
    """

    cls: Tensor
    dist: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """The model's answer, `(batch, classes)`: the mean of both tokens' where there are two."""
        return self.cls if self.dist is None else (self.cls + self.dist) / 2


def host_class(module: nn.Module) -> type:
    """The class of a module as its library has it: a class of ours that only saves and loads in another way (those of
    `nvit.hf`) names it as `host_class`; a subclass of such a class is another again."""
    return vars(type(module)).get("host_class", type(module))


class Adapter(ABC):
    """One model family: which weights leave together, declared rather than traced.

    `knows`, `refusal`, `prepare` and `preprocess` take models as users have them, prepared or not; every other method
    takes prepared ones, dense or compact. A prepared model carries the constructor arguments of its dense host as
    `dense_config`; those that people change later are read from the model itself (`settings`). See
    `one_stream.OneStream` for models of one residual stream, which have less to say.

    Attributes:
        family: its name in `FAMILIES` and in a spec.

    >>> model = nvit.load(nvit.BUNDLED)
    >>> adapter = nvit.adapters.find(model)
    >>> adapter.family, [group.name for group in adapter.groups(model)][:3]
    ('timm_vit', ['emb', 'blocks.0.heads', 'blocks.0.qk_dim'])
    """

    family: ClassVar[str]

    @abstractmethod
    def knows(self, model: nn.Module) -> bool:
        """Whether the model is of this family at all; a subclass of a host may compute something else."""

    def hosts(self) -> tuple[type, ...]:
        """The classes of models that it knows, those that can be had without an import."""
        return ()

    @abstractmethod
    def refusal(self, model: nn.Module) -> str | None:
        """Why a model of this family is not supported, or None."""

    @abstractmethod
    def prepare(self, model: nn.Module) -> nn.Module:
        """Swap in prunable layers, in place; outputs, parameters and their names stay as they are.

        Returns:
            The model; a prepared one with a new classifier made prunable, else unchanged.
        """

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The modules that hold a block each, attention and MLP, in the order of `ViTSpec.blocks`."""

    @abstractmethod
    def groups(self, model: nn.Module, bundle_sizes: Mapping[str, int] = BUNDLE_SIZES) -> list[Group]:
        """Every prunable width and its slices; what leaves in one move is `bundle_sizes[kind]` units."""

    def spec(self, model: nn.Module, blocks: Sequence[BlockWidths]) -> ViTSpec:
        """The spec of the model with these widths of its blocks, as far as its constructor's arguments go."""
        images = {k: list(v) if isinstance(v, tuple) else v for k, v in self.preprocess(model).items()}
        config = {**model.dense_config, **self.settings(model)}
        if (width := restored_width(model)) is not None:
            config[KEEP_OUTPUT] = width
        merges, name = self.merges(model), self.name(model)
        kind, labels = host_class(model).__name__, tuple(getattr(model, "class_names", ()))
        return ViTSpec(self.family, kind, config, tuple(blocks), images, name, merges=merges, labels=labels)

    @abstractmethod
    def settings(self, model: nn.Module) -> dict[str, Any]:
        """Constructor arguments that a model may have changed since it was prepared (classes, image size, pooling), as
        they are now."""

    @abstractmethod
    def extent(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Blocks, tokens and channels of the dense model of a config, by arithmetic alone: what has to be known before
        anything is built. 0 for what the config does not say."""

    def name(self, model: nn.Module) -> str:
        """What people call the model in its library; its class where nobody gave it a name."""
        return type(model).__name__

    @abstractmethod
    def build(self, spec: ViTSpec, device: str = "meta") -> nn.Module:
        """The prepared dense model of `spec`: on the meta device its structure alone, elsewhere freshly initialised.

        Raises:
            ValueError: an architecture or constructor argument this version does not know.
        """

    @abstractmethod
    def resize(self, model: nn.Module, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> nn.Module:
        """Give the model these cut parameters and the widths that `masks` leaves, in place; returns it."""

    def logits(self, model: nn.Module, images: Tensor) -> Logits:
        """What the model says of `images`; of a plain classifier there is no distillation token. Of a tower without a
        classifier, the features that were chosen (`tower.choose_features_`): `(batch, width)`, or a token each.
        """
        if (choice := chosen(model)) == "auto":
            return Logits(self.features(model, images))
        return Logits(picked(self.token_stream(model, images), self.leading(model), choice, type(model).__name__))

    def features(self, model: nn.Module, images: Tensor) -> Tensor:
        """What the model's own forward hands out."""
        return model(images)

    @abstractmethod
    def output_norm(self, model: nn.Module) -> str:
        """The name of the last norm, through which a tower's output leaves; empty where the output keeps its width
        whatever is pruned.

        Raises:
            ValueError: it does not leave through one norm.
        """

    @abstractmethod
    def token_stream(self, model: nn.Module, images: Tensor) -> Tensor:
        """All tokens behind the last norm, `(batch, tokens, width)`, those before the patches first."""

    @abstractmethod
    def leading(self, model: nn.Module) -> int:
        """How many tokens come before the patches; if any, the class token is the first."""

    @abstractmethod
    def preprocess(self, model: nn.Module) -> dict[str, Any]:
        """How images are prepared for the model, as timm's data config; `input_size` is always there."""

    def label_names(self, model: nn.Module) -> dict[str, int]:
        """Class numbers by the model's own names of its classes (`class_names`, which a new head got); empty where it
        has none. timm's ImageNet models are known by their number of classes, whose names are WordNet synsets."""
        if own := getattr(model, "class_names", ()):
            return {name: i for i, name in enumerate(own)}
        subset = infer_imagenet_subset(model)
        return {} if subset is None else {name: i for i, name in enumerate(ImageNetInfo(subset).label_names())}

    def new_head_(self, model: nn.Module, names: Sequence[str]) -> None:
        """Give a prepared model, dense or compact, a freshly drawn classifier of these classes, in place.

        Raises:
            ValueError: the family has no such head.
        """
        raise ValueError(f"{type(model).__name__}: family {self.family} has no head that can be replaced")

    def set_image_size_(self, model: nn.Module, size: tuple[int, int]) -> None:
        """Give a prepared model, dense or compact, images of another height and width, in place.

        Raises:
            ValueError: positions of the family do not follow, or patches do not fill them.
        """
        raise ValueError(
            f"{type(model).__name__}: the image size of family {self.family} is settled when a model is made; give the "
            "dense model --img-size and prune it at that size"
        )

    def task(self, model: nn.Module) -> str | None:
        """The task that a model's own config names, a key of `tasks.TASKS`; None where it says nothing."""
        return None

    @abstractmethod
    def tokens(self, model: nn.Module) -> int:
        """Tokens in the (first) residual stream at the model's own input size."""

    def merge_refusal(self, model: nn.Module) -> str | None:
        """Why tokens of a model of this family cannot merge, or None."""
        return f"{type(model).__name__} merges no tokens; timm's VisionTransformer and DeiT do"

    def prefix(self, model: nn.Module) -> int:
        """Tokens at the front that never merge: class, distillation, registers."""
        return 0

    def merges(self, model: nn.Module) -> tuple[int, ...]:
        """How many tokens merge in every block of a prepared model; empty where none do."""
        return ()

    def merge_(self, model: nn.Module, merges: Sequence[int]) -> None:
        """Let so many tokens merge in every block of a prepared model, in place; 0 everywhere, or nothing, ends it.

        Raises:
            ValueError: this family cannot, or there are not as many tokens.
        """
        if any(merges):
            raise ValueError(f"tokens cannot merge: {self.merge_refusal(model)}")

    @abstractmethod
    def parts(self, model: nn.Module) -> tuple[Part, ...]:
        """The parts whose latencies add up to the model's."""

    @abstractmethod
    def part_macs(self, model: nn.Module, part: Part) -> Callable[..., int]:
        """Multiply-accumulates an image of one piece of `part`, as a function of its widths; multilinear."""

    @abstractmethod
    def sample_spec(self, spec: ViTSpec, part: Part, widths: Sequence[int]) -> ViTSpec:
        """The spec of the smallest model that holds one piece of `part` at these widths, elsewhere the widest."""

    @abstractmethod
    def piece(self, model: nn.Module, part: Part) -> Piece:
        """That piece of such a model, which may lose what does not belong to it."""

    def restored_macs(self, model: nn.Module) -> int:
        """Multiply-accumulates an image and channel of the stream of what restores the output's width, if anything."""
        width = restored_width(model)
        if width is None:
            return 0
        pooled = self.output_norm(model).endswith("fc_norm")
        return width * (1 if pooled else self.tokens_out(model))

    def tokens_out(self, model: nn.Module) -> int:
        """Tokens behind the last block."""
        return self.tokens(model) - sum(self.merges(model))

    def block_names(self, model: nn.Module) -> list[str]:
        """Names of `blocks`, in their order."""
        names = {module: name for name, module in model.named_modules()}
        return [names[block] for block in self.blocks(model)]
