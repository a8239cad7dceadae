"""timm's layers that several families share: what of them is known, and their prunable form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import GluMlp, SwiGLU
from timm.layers import Mlp as TimmMlp
from torch import nn

from ..layers import Absent, GatedMlp, Layout, Linear, Mlp, Norm, Prunable
from .declare import EMB, norm, with_axes
from .timm_config import ACTIVATIONS, NORMS


def is_norm(m: nn.Module) -> bool:
    """Whether `m` is a norm that has a prunable form, or is one."""
    known_type = isinstance(m, Norm) or type(m) in (nn.LayerNorm, *NORMS.values())
    return known_type and m.weight is not None


def is_norm_or_none(m: nn.Module | None) -> bool:
    return m is None or isinstance(m, nn.Identity) or is_norm(m)


def stream_norm(host: nn.Module, **more: bool) -> nn.Module:
    """The prunable form of a norm over the only stream, see `declare.norm`; an identity stays."""
    return host if isinstance(host, nn.Identity) else norm(host, EMB, **more)


def inner_norm(host: nn.Module | None, layout: Layout, scored: bool = False) -> Norm | None:
    """The prunable form of a norm inside an attention or MLP layer; None for none."""
    return None if host is None or isinstance(host, nn.Identity) else norm(host, {}, layout=layout, scored=scored)


def classifier(host: nn.Module, axes: Mapping[str, str], reads_stream: bool = False) -> nn.Module:
    """A linear classifier whose inputs are the stream; anything else stays. See `Linear` for `reads_stream`."""
    if not isinstance(host, nn.Linear):
        return host
    layer = Linear(host, inputs=Layout.of("emb", host.in_features), reads_stream=reads_stream)
    return with_axes(axes, layer, host)


def stem_refusal(embed: nn.Module) -> str | None:
    """Why a patch embedding has no prunable form, or None: it has to be one convolution over patches that lie side by
    side."""
    proj = embed.proj
    if type(proj) is not nn.Conv2d:
        inside = ", ".join(type(m).__name__ for m in proj.children())
        return f"a stem of {type(proj).__name__}{f' ({inside})' * bool(inside)} where one convolution was expected"
    plain = tuple(proj.kernel_size) == tuple(proj.stride) == tuple(embed.patch_size)
    if not plain or proj.groups != 1 or any(proj.padding) or any(d != 1 for d in proj.dilation):
        return (
            f"a convolutional stem (kernel {proj.kernel_size}, stride {proj.stride}); patches have to lie side by side"
        )
    return None


def block_refusal(block: nn.Module) -> str | None:
    """Why norms or MLP of a pre-norm block have no prunable form, or None. No norm stands before what has left."""
    for layer, before in ((block.attn, block.norm1), (block.mlp, block.norm2)):
        if not (is_norm(before) or isinstance(layer, Absent)):
            return f"norm type {type(before).__name__}"
    return mlp_refusal(block.mlp)


def mlp_refusal(mlp: nn.Module) -> str | None:
    """Why an MLP of a block has no prunable form, or None."""
    if isinstance(mlp, (Absent, Mlp, GatedMlp)):
        return None
    if type(mlp) not in (TimmMlp, GluMlp, SwiGLU) or not isinstance(mlp.fc2, nn.Linear):
        return f"MLP type {type(mlp).__name__}"
    if not is_norm_or_none(mlp.norm):
        return f"norm type {type(mlp.norm).__name__} inside the MLP"
    if len(rates := {m.p for m in (mlp.drop1, mlp.drop2)}) > 1:
        return f"two dropout rates in one MLP ({rates})"
    return None if type(mlp.act) in ACTIVATIONS.values() else f"activation {type(mlp.act).__name__}"


def mlp(host: nn.Module, axes: Mapping[str, str]) -> Prunable:
    """The prunable form of timm's Mlp, GluMlp or SwiGLU."""
    inner = inner_norm(host.norm, Layout.of("mlp", host.fc2.in_features))
    if type(host) is TimmMlp:
        return with_axes(axes, Mlp(host, host.act, drop=host.drop2.p, norm=inner), host)
    first = [n for n in ("fc1", "fc1_g", "fc1_x") if hasattr(host, n)]
    more: dict[str, Any] = {"gate_last": getattr(host, "gate_last", False), "norm": inner}
    return with_axes(axes, GatedMlp(host, host.act, first=first, drop=host.drop2.p, **more), host)
