"""What a family adds whose tokens make a map of features, so that a head for every pixel can read them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from ..layers import Prunable
from .declare import EMB
from .pooling import LatentPool
from .timm_layers import classifier, is_norm


class FeatureMaps(ABC):
    """The part of an adapter that hands out a map of features. Models are prepared, dense or compact."""

    @abstractmethod
    def headless_(self, model: nn.Module) -> None:
        """Take off the classifier, in place.

        Raises:
            ValueError: what follows the tokens cannot be left out.
        """

    @abstractmethod
    def feature_map(self, model: nn.Module, images: Tensor) -> Tensor:
        """Tokens behind the last norm, without class token and registers, `(batch, rows, columns, channels)`."""

    @abstractmethod
    def map_shape(self, model: nn.Module) -> tuple[int, int, int]:
        """Rows, columns and channels of the map, at the model's own image size."""

    @abstractmethod
    def map_reader(self, model: nn.Module, layer: nn.Linear) -> Prunable:
        """The prunable form of a linear layer that reads the map."""


class PlainMaps(FeatureMaps):
    """Of timm's plain transformers. A norm behind pooling stands before it here: token by token."""

    def headless_(self, model: nn.Module) -> None:
        if isinstance(getattr(model, "attn_pool", None), (AttentionPoolLatent, LatentPool)):
            raise ValueError(
                f"{type(model).__name__} pools its tokens by attention, which a head for pixels has no use for; take a "
                "model with a class token or average pooling"
            )
        model.reset_classifier(0)
        model.class_names = ()

    def feature_map(self, model: nn.Module, images: Tensor) -> Tensor:
        tokens = model.fc_norm(model.forward_features(images)[:, model.num_prefix_tokens :])
        return tokens.unflatten(1, model.patch_embed.dynamic_feat_size(images.shape[-2:]))

    def map_shape(self, model: nn.Module) -> tuple[int, int, int]:
        return (*model.patch_embed.grid_size, model.embed_dim)

    def map_reader(self, model: nn.Module, layer: nn.Linear) -> Prunable:
        normed = is_norm(model.norm) or is_norm(model.fc_norm)
        return classifier(layer, EMB, reads_stream=not normed)
