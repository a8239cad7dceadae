"""timm's layers that several families share: their names in a spec, what of them is known, their prunable form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from timm.layers import GluMlp, QuickGELU, RmsNorm, SwiGLU
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import Mlp as TimmMlp
from timm.layers.activations import GELUTanh
from torch import nn

from ..layers import GatedMlp, Layout, Linear, Mlp, Norm, Prunable
from .declare import norm, with_axes

ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": GELUTanh, "quick_gelu": QuickGELU, "relu": nn.ReLU, "silu": nn.SiLU}
NORMS = {"layernorm": TimmLayerNorm, "rmsnorm": RmsNorm}
MLPS: dict[str, Callable[..., nn.Module]] = {
    "mlp": TimmMlp,
    "glu": GluMlp,
    "glu_gate_first": partial(GluMlp, gate_last=False),
    "swiglu": SwiGLU,
}
"""How timm's MLPs are named in a spec; `glu_gate_first` with SiLU is the packed SwiGLU of DINOv2's giant."""


def is_norm(m: nn.Module) -> bool:
    """Whether `m` is a norm that has a prunable form, or is one."""
    known_type = isinstance(m, Norm) or type(m) in (nn.LayerNorm, *NORMS.values())
    return known_type and m.weight is not None


def is_norm_or_none(m: nn.Module | None) -> bool:
    return m is None or isinstance(m, nn.Identity) or is_norm(m)


def inner_norm(host: nn.Module | None, layout: Layout, scored: bool = False) -> Norm | None:
    """The prunable form of a norm inside an attention or MLP layer; None for none."""
    return None if host is None or isinstance(host, nn.Identity) else norm(host, {}, layout=layout, scored=scored)


def classifier(host: nn.Module, axes: Mapping[str, str], reads_stream: bool = False) -> nn.Module:
    """A linear classifier whose inputs are the stream; anything else stays. See `Linear` for `reads_stream`."""
    if not isinstance(host, nn.Linear):
        return host
    layer = Linear(host, inputs=Layout.of("emb", host.in_features), reads_stream=reads_stream)
    return with_axes(axes, layer, host)


def mlp_refusal(mlp: nn.Module) -> str | None:
    """Why an MLP of a block has no prunable form, or None."""
    if isinstance(mlp, (Mlp, GatedMlp)):
        return None
    if type(mlp) not in (TimmMlp, GluMlp, SwiGLU) or not isinstance(mlp.fc2, nn.Linear):
        return f"MLP type {type(mlp).__name__}"
    if not is_norm_or_none(mlp.norm):
        return f"norm type {type(mlp.norm).__name__} inside the MLP"
    return None if type(mlp.act) in ACTIVATIONS.values() else f"activation {type(mlp.act).__name__}"


def mlp(host: nn.Module, axes: Mapping[str, str]) -> Prunable:
    """The prunable form of timm's Mlp, GluMlp or SwiGLU."""
    inner = inner_norm(host.norm, Layout.of("mlp", host.fc2.in_features))
    if type(host) is TimmMlp:
        return with_axes(axes, Mlp(host, host.act, drop=host.drop2.p, norm=inner), host)
    first = [n for n in ("fc1", "fc1_g", "fc1_x") if hasattr(host, n)]
    more: dict[str, Any] = {"gate_last": getattr(host, "gate_last", False), "norm": inner}
    return with_axes(axes, GatedMlp(host, host.act, first=first, drop=host.drop2.p, **more), host)


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
