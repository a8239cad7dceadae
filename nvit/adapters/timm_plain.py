"""What timm's plain transformers share: a patch embedding, one residual stream through all blocks, norms, a pooling and
classifiers behind them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from timm.layers import AttentionPoolLatent, PatchEmbed
from torch import Tensor, nn

from ..layers import Norm, StreamEntry
from ..spec import Slice
from . import timm_config
from .declare import EMB, embedding_slices, resize_layers
from .ended import end_
from .feature_maps import PlainMaps
from .one_stream import OneStream
from .pooling import LatentPool, latent_pool, pool_macs, pool_refusal
from .timm_host import TimmAdapter
from .timm_layers import classifier, is_norm, is_norm_or_none, stem_refusal, stream_norm
from .tower import restored_width


class TimmPlain(TimmAdapter, PlainMaps, OneStream):
    """The adapter of a plain transformer of timm."""

    @abstractmethod
    def block_refusal(self, block: nn.Module) -> str | None:
        """Why a block, prepared or not, is not supported, or None."""

    def pooled_tokens(self, model: nn.Module) -> int:
        """Tokens that attention pooling reads."""
        return self.tokens(model)

    def classifiers(self, model: nn.Module) -> int:
        """How many classifiers read the stream."""
        return 1

    def refusal(self, model: nn.Module) -> str | None:
        if type(model.patch_embed) is not PatchEmbed:
            return f"patch embedding type {type(model.patch_embed).__name__}"
        if (stem := stem_refusal(model.patch_embed)) is not None:
            return stem
        if not is_norm_or_none(model.patch_embed.norm):
            return f"norm type {type(model.patch_embed.norm).__name__} in the patch embedding"
        entry = getattr(model, "norm_pre", None)
        if not (isinstance(entry, StreamEntry) or is_norm_or_none(entry)):
            return f"norm type {type(entry).__name__} before the blocks"
        for last in (model.norm, model.fc_norm):
            if not is_norm_or_none(last):
                return f"norm type {type(last).__name__} after the blocks"
        if len(model.blocks) == 0:
            return "no blocks"
        of_block = next((r for r in map(self.block_refusal, model.blocks) if r), None)
        return of_block or pool_refusal(getattr(model, "attn_pool", None))

    def stack(self, model: nn.Module) -> nn.ModuleList | nn.Sequential:
        return model.blocks

    def emb(self, model: nn.Module) -> int:
        return model.embed_dim

    def embeddings(self, model: nn.Module) -> list[Slice]:
        patches = {"patch_embed.proj.weight": 0, "patch_embed.proj.bias": 0}
        tokens = dict.fromkeys(("cls_token", "dist_token", "reg_token", "pos_embed"), 2)
        return embedding_slices(model, tokens | patches, patches)

    def resize(self, model: nn.Module, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> nn.Module:
        resize_layers(model, end_(model, self.norms(model), params, masks), masks)
        emb = int(masks["emb"].sum())
        model.embed_dim, model.num_features = emb, restored_width(model) or emb
        if not isinstance(getattr(model, "attn_pool", None), LatentPool):
            model.head_hidden_size = model.num_features
        model.patch_embed.proj.out_channels = emb
        for info in model.feature_info:
            info["num_chs"] = emb
        return model

    def output_norm(self, model: nn.Module) -> str:
        found = [name for name in ("norm", "fc_norm") if isinstance(getattr(model, name, None), Norm)]
        if len(found) != 1:
            raise ValueError(
                f"keep_output: this {type(model).__name__} has {len(found)} norms behind its blocks, expected one; "
                "prune without it, which leaves the stream whole"
            )
        return found[0]

    def tokens(self, model: nn.Module) -> int:
        return model.patch_embed.num_patches + model.num_prefix_tokens

    def rest_macs(self, model: nn.Module) -> Callable[[int], int]:
        conv = model.patch_embed.proj.weight[0].numel() * model.patch_embed.num_patches
        pool = getattr(model, "attn_pool", None)
        if isinstance(pool, LatentPool):
            per_channel, fixed = pool_macs(pool, self.pooled_tokens(model))
            if restored := self.restored_macs(model):
                conv, per_channel, fixed = conv + restored, 0, fixed + per_channel * pool.kv.weight.shape[1]
            return lambda emb: (conv + per_channel) * emb + fixed + pool.out_features * model.num_classes
        outputs = self.classifiers(model) * model.num_classes + self.restored_macs(model)
        return lambda emb: (conv + outputs) * emb


def prepare_output(model: nn.Module) -> None:
    """Swap what follows the blocks for prunable layers: norms, pooling, classifiers."""
    model.norm = stream_norm(model.norm)
    if isinstance(getattr(model, "attn_pool", None), AttentionPoolLatent):
        model.attn_pool = latent_pool(model.attn_pool, EMB)  # norm and classifier behind it work in its own width
        return
    model.fc_norm = stream_norm(model.fc_norm)
    prepare_heads(model)


def prepare_heads(model: nn.Module) -> nn.Module:
    """Make plain linear classifiers prunable, also those that a prepared model got since; returns the model."""
    normed = is_norm(model.norm) or is_norm(model.fc_norm)
    if not isinstance(getattr(model, "attn_pool", None), LatentPool):
        for name in ("head", "head_dist"):
            if type(head := getattr(model, name, None)) is nn.Linear:
                setattr(model, name, classifier(head, EMB, reads_stream=not normed))
    return model


def embedding_config(model: nn.Module) -> dict[str, Any]:
    """Constructor arguments of the patches' and the stream's size."""
    return {
        "patch_size": list(model.patch_embed.patch_size),
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
    }


def norm_config(model: nn.Module) -> dict[str, Any]:
    """Which norm the model is made with, see `timm_config.norm_config`."""
    first = model.blocks[0].norm1
    like = next((m for m in (model.norm, model.fc_norm) if is_norm(m)), first)
    return timm_config.norm_config(first, like)
