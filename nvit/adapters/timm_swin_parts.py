"""What a Swin's latency is made of: its parts, their multiply-accumulates, the smallest models that hold a piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from torch import nn

from ..spec import KINDS, BlockWidths, Part, ViTSpec
from .base import Adapter, Piece
from .timm_swin_windows import windows_of

NEIGHBOURS = 4
"""Tokens that patch merging joins to one; a channel of the stream is in each."""


def spans_of(depths: Sequence[int]) -> list[range]:
    """Indices in the whole model of the blocks of each stage."""
    return [range(end - depth, end) for depth, end in zip(depths, accumulate(depths), strict=True)]


class SwinParts(Adapter):
    """The part of Swin's adapter that latency tables ask."""

    def parts(self, model: nn.Module) -> tuple[Part, ...]:
        """Of each stage its attentions, those in shifted windows, and its MLPs, each with norm and residual; the merges
        between stages; the patch embedding (`stem`), and what follows the last block (`head`)."""
        spans, found = spans_of([len(stage.blocks) for stage in model.layers]), [Part("stem", ("emb",), ((0,),))]
        for s, (stage, span) in enumerate(zip(model.layers, spans, strict=True)):
            if s:
                found.append(Part(f"merge.{s}", ("emb", "emb"), ((spans[s - 1][-1], span[0]),)))
            shifted = [any(block.shift_size) for block in stage.blocks]
            for name, which in (("attention", False), ("shifted", True)):
                mine = tuple((i,) * 4 for i, shift in zip(span, shifted, strict=True) if shift is which)
                if mine:
                    found.append(Part(f"{name}.{s}", ("emb", "heads", "qk_dim", "v_dim"), mine))
            found.append(Part(f"mlp.{s}", ("emb", "mlp"), tuple((i, i) for i in span)))
        return (*found, Part("head", ("emb",), ((spans[-1][-1],),)))

    def part_macs(self, model: nn.Module, part: Part) -> Callable[..., int]:
        name, _, stage = part.name.partition(".")
        if name == "stem":
            conv = model.patch_embed.proj.weight[0].numel() * model.patch_embed.num_patches
            return lambda emb: conv * emb
        if name == "head":
            pooled = model.head.global_pool.feat_mult() * model.num_classes
            unpooled = math.prod(model.layers[-1].output_resolution) if model.head.global_pool.is_identity() else 1
            restored = self.restored_macs(model)
            return lambda emb: (pooled * unpooled + restored) * emb
        block, length = model.layers[int(stage)].blocks[0], math.prod(model.layers[int(stage)].output_resolution)
        if name == "merge":
            return lambda before, after: length * NEIGHBOURS * before * after
        if name == "mlp":
            return lambda emb, hidden: length * 2 * emb * hidden
        area = math.prod(block.window_size)
        padded = windows_of(block) * area
        return lambda emb, heads, qk, v: padded * heads * (emb * (2 * qk + v) + v * emb + area * (qk + v))

    def tokens_out(self, model: nn.Module) -> int:
        return math.prod(model.layers[-1].output_resolution)

    def output_norm(self, model: nn.Module) -> str:
        return "norm"

    def sample_spec(self, spec: ViTSpec, part: Part, widths: Sequence[int]) -> ViTSpec:
        """The stage of `part`, or for a merge the two it joins, with one block of `widths` along the axes of `part`
        and elsewhere the widest of its stage; with two such blocks where the shifted one is meant."""
        config, (name, _, stage) = spec.config, part.name.partition(".")
        last = {"stem": 0, "head": len(config["depths"]) - 1}.get(name) if not stage else int(stage)
        first, depth = last - (name == "merge"), 2 if name == "shifted" else 1
        grid = [side // patch for side, patch in zip(config["img_size"], config["patch_size"], strict=True)]
        grid = [math.ceil(side / 2**first) for side in grid]
        mine = {key: config[key][first : last + 1] for key in ("num_heads", "head_dim", "window_size", "mlp_ratio")}
        mine |= {"embed_dim": config["embed_dim"] * 2**first, "depths": [depth] * (last + 1 - first)}
        mine["img_size"] = [side * patch for side, patch in zip(grid, config["patch_size"], strict=True)]
        blocks = []
        for span in spans_of(config["depths"])[first : last + 1]:
            here = {kind: max(getattr(spec.blocks[i], kind) for i in span) for kind in KINDS}
            blocks += [BlockWidths(**here)] * depth
        if name == "merge":
            blocks = [replace(block, emb=emb) for block, emb in zip(blocks, widths, strict=True)]
        else:
            blocks = [replace(block, **dict(zip(part.kinds, widths, strict=True))) for block in blocks]
        return replace(spec, config={**config, **mine}, blocks=tuple(blocks))

    def piece(self, model: nn.Module, part: Part) -> Piece:
        """The last block's attention or MLP with norm and residual, patch merging, the patch embedding, or what follows
        the last block."""
        name, stage = part.name.partition(".")[0], model.layers[-1]
        if name == "stem":
            return model.patch_embed, self.preprocess(model)["input_size"]
        if name == "merge":
            return stage.downsample, (*model.layers[0].output_resolution, model.embed_dim)
        block, tokens_of_it = stage.blocks[-1], (*stage.output_resolution, model.num_features)
        if name == "head":
            return lambda x: model.forward_head(model.norm(x)), tokens_of_it
        if name == "mlp":
            return lambda x: x + block.mlp(block.norm2(x)), (math.prod(tokens_of_it[:-1]), model.num_features)
        return lambda x: x + block._attn(block.norm1(x)), tokens_of_it
