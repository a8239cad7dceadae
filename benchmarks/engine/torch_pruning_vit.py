"""Torch-Pruning 1.6 as it is meant for timm's ViT; `pip install torch-pruning` is needed where a pruner is made."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from nvit.analysis.evaluate import macs


def twin_of(model: nn.Module) -> nn.Module:
    """A copy with its gradients."""
    other = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    return other


def _width_free(attn: Attention, x: Tensor, **_) -> Tensor:
    """timm's attention for a head width that has changed; the host reshapes to the embedding's width."""
    batch, tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
    return attn.proj(out.transpose(1, 2).reshape(batch, tokens, -1))


def pruner_of(
    model: nn.Module,
    ratio: float,
    importance: Any = None,
    *,
    input_size: tuple[int, ...] = (3, 224, 224),
    ignored: Iterable[nn.Module] = (),
    **options,
):
    """Torch-Pruning's pruner: all widths ranked together, head dims within heads; `finish` after its `step()`.

    Args:
        importance: one of Torch-Pruning's; Taylor by default, which reads the parameters' gradients.
        ignored: layers whose outputs stay, besides the classifier.
        options: more of `BasePruner`.
    """
    import torch_pruning as tp

    heads = {}
    for m in model.modules():
        if isinstance(m, Attention):
            m.forward = types.MethodType(_width_free, m)
            heads[m.qkv] = m.num_heads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.pruner.BasePruner(
            model,
            torch.randn(1, *input_size),
            importance=importance or tp.importance.GroupTaylorImportance(),
            global_pruning=True,
            pruning_ratio=ratio,
            ignored_layers=[model.head, *ignored],
            num_heads=heads,
            in_channel_groups={},  # its defaults are shared between pruners, and would keep every model alive
            out_channel_groups={},
            **options,
        )


def finish(model: nn.Module, pruner) -> nn.Module:
    """Tell timm's attention its new head widths, which Torch-Pruning leaves to its user."""
    for m in model.modules():
        if isinstance(m, Attention):
            m.num_heads = pruner.num_heads[m.qkv]
            m.head_dim = m.qkv.out_features // (3 * m.num_heads)
    return model


def all_but_hidden(model: nn.Module) -> list[nn.Module]:
    """Layers to ignore so that hidden MLP units alone leave."""
    hidden = {block.mlp.fc1 for block in model.blocks}
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m not in hidden]


def narrowed(
    model: nn.Module,
    share: float,
    importance: Any,
    *,
    mlp_only: bool = False,
    input_size: tuple[int, ...] = (3, 224, 224),
    bisections: int = 13,
    known: dict[float, tuple[nn.Module, float]] | None = None,
    **options,
) -> tuple[nn.Module, float]:
    """The narrowest model that Torch-Pruning makes of a copy of `model` with at least `share` of its MACs.

    Bisection on the pruning ratio, each time from the dense model in one step.

    Args:
        known: what earlier calls for other shares made by pruning ratio, to begin with; a second or two each.

    Returns:
        The model, and the share of MACs it has.
    """
    dense = macs(model, input_size)
    known = {} if known is None else known
    found, kept = model, 1.0
    low, high = 0.0, 1.0
    for _ in range(bisections):
        middle = (low + high) / 2
        if middle not in known:
            small = twin_of(model)
            ignored = all_but_hidden(small) if mlp_only else ()
            pruner = pruner_of(small, middle, importance, input_size=input_size, ignored=ignored, **options)
            pruner.step()
            known[middle] = small, macs(finish(small, pruner), input_size) / dense
        small, now = known[middle]
        if now >= share:
            found, kept, low = small, now, middle
        else:
            high = middle
    return found, kept
