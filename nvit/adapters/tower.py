"""What a tower without a classifier is taken to hand out: what its library does, its class token, the mean of its
patches, or all its tokens."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers import RestoringNorm

CHOICES = ("auto", "class", "pooled", "tokens")
"""Of features: the tower's own, then one vector an image or one a token, behind the last norm."""

KEEP_OUTPUT = "keep_output"
"""The key of a spec's config that holds the width of a restored output."""

_CHOICE = "feature_choice"


def restored_width(model: nn.Module) -> int | None:
    """The width that a prepared model's output is brought to, see `restore.restore_`; None where nothing is."""
    found = next((m for m in model.modules() if isinstance(m, RestoringNorm)), None)
    return None if found is None else found.restore.weight.shape[0]


def choose_features_(model: nn.Module, choice: str) -> nn.Module:
    """Have `adapters.predict` and the engine take these features of a prepared tower from now on; the model's own
    forward stays as it is. Copies choose alike, a snapshot says nothing of it.

    >>> tower = nvit.load(nvit.BUNDLED)
    >>> nvit.adapters.choose_features_(tower, "pooled") is tower
    True
    """
    setattr(model, _CHOICE, choice)
    return model


def chosen(model: nn.Module) -> str:
    """The choice made for a model, `auto` where none was."""
    return getattr(model, _CHOICE, "auto")


def picked(tokens: Tensor, prefix: int, choice: str, name: str) -> Tensor:
    """The features of a stream of tokens.

    Args:
        tokens: `(batch, prefix + patches, width)` behind the last norm, the class token first where there is a prefix.
        name: of the model, for errors.

    Raises:
        ValueError: the class token is asked for, and there is none.
    """
    if choice == "class" and not prefix:
        raise ValueError(f"features class: {name} has no class token; take pooled or tokens")
    return tokens if choice == "tokens" else tokens[:, 0] if choice == "class" else tokens[:, prefix:].mean(1)
