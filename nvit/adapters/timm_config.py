"""timm models and their constructors' arguments: how a spec names them, read off a model, and given back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from timm.layers import GluMlp, QuickGELU, RmsNorm, SwiGLU
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import Mlp as TimmMlp
from timm.layers.activations import GELUTanh
from torch import nn

ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": GELUTanh, "quick_gelu": QuickGELU, "relu": nn.ReLU, "silu": nn.SiLU}
NORMS = {"layernorm": TimmLayerNorm, "rmsnorm": RmsNorm}
MLPS: dict[str, Callable[..., nn.Module]] = {
    "mlp": TimmMlp,
    "glu": GluMlp,
    "glu_gate_first": partial(GluMlp, gate_last=False),
    "swiglu": SwiGLU,
}
"""How timm's MLPs are named in a spec; `glu_gate_first` with SiLU is the packed SwiGLU of DINOv2's giant."""


def name_in(known: Mapping[str, Any], m: nn.Module | type) -> str:
    """The key of a layer's class in one of the maps above."""
    cls = m if isinstance(m, type) else type(m)
    found = next((name for name, value in known.items() if value is cls), None)
    return found or ("layernorm" if cls is nn.LayerNorm else cls.__name__)


def known(config: dict[str, Any], key: str, names: Mapping[str, Any], default: str = "") -> Any:
    """What a spec's config names under `key`, taken out of it.

    Raises:
        ValueError: a name this version does not know.
    """
    name = config.pop(key, default)
    if name not in names:
        raise ValueError(f"{key} {name!r} is unknown; expected one of {', '.join(names)}")
    return names[name]


def mlp_name(host: nn.Module) -> str:
    """The key of `MLPS` for a timm MLP that is not yet prepared."""
    if type(host) is GluMlp:
        return "glu" if host.gate_last else "glu_gate_first"
    return "swiglu" if type(host) is SwiGLU else "mlp"


def mlp_hidden(host: nn.Module) -> int:
    """`hidden_features` that timm's constructor gets: both halves of a packed layer."""
    return (getattr(host, "fc1", None) or host.fc1_g).out_features


def mlp_ratio(emb: int, hidden: int) -> float:
    """`mlp_ratio` from which timm's `int(emb * ratio)` gets `hidden` back."""
    ratio = hidden / emb
    return ratio if int(emb * ratio) == hidden else (hidden + 0.5) / emb


def norm_config(norm: nn.Module, like: nn.Module) -> dict[str, Any]:
    """Which norm a model is made with, as `norm_layer` reads it.

    Args:
        norm: one whose class is the model's.
        like: one that has the model's epsilon and bias.
    """
    config = {"norm_layer": name_in(NORMS, norm), "norm_eps": like.eps}
    if getattr(like, "bias", None) is None and config["norm_layer"] == "layernorm":
        config["norm_bias"] = False
    return config


def norm_layer(config: dict[str, Any], eps: float = 1e-6) -> Callable[..., nn.Module]:
    """The norm's constructor from what `norm_config` wrote, which is taken out of the config.

    Args:
        eps: where the config names none.

    Raises:
        ValueError: a norm this version does not know.
    """
    more = {"eps": config.pop("norm_eps", eps)} | ({} if config.pop("norm_bias", True) else {"bias": False})
    return partial(known(config, "norm_layer", NORMS, "layernorm"), **more)
