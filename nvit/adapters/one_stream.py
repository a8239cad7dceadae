"""Models with one residual stream through equal blocks: what all of them have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn

from ..layers import Attention, GatedMlp
from ..layers.merging import counts
from ..spec import BUNDLE_SIZES, KINDS, BlockWidths, Group, Part, Slice, ViTSpec
from .base import Adapter, Piece
from .declare import Width, block_widths, collect
from .ended import has


class OneStream(Adapter):
    """The adapter of a model that is an embedding, a stack of blocks and what follows them.

    Attributes:
        depth_key: the constructor argument that counts blocks.
    """

    depth_key: ClassVar[str] = "depth"

    @abstractmethod
    def stack(self, model: nn.Module) -> nn.ModuleList | nn.Sequential:
        """What holds the blocks."""

    @abstractmethod
    def emb(self, model: nn.Module) -> int:
        """Channels of the stream."""

    def norms(self, model: nn.Module) -> Mapping[str, str]:
        """Of a block, the name of its attention and of its MLP, and of the norm before each."""
        return {"attn": "norm1", "mlp": "norm2"}

    @abstractmethod
    def embeddings(self, model: nn.Module) -> list[Slice]:
        """Slices along the stream of what enters the blocks, see `declare.embedding_slices`."""

    @abstractmethod
    def steps(self, model: nn.Module, part: Part) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The first block's attention and its MLP, each with its norm and residual, stream to stream; with the merge of
        tokens that `part` names."""

    @abstractmethod
    def rest_macs(self, model: nn.Module) -> Callable[[int], int]:
        """Multiply-accumulates an image of the model without its blocks, by its emb."""

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(self.stack(model))

    def groups(self, model: nn.Module, bundle_sizes: Mapping[str, int] = BUNDLE_SIZES) -> list[Group]:
        """Every prunable width: `emb`, then `heads`, `qk_dim`, `v_dim` and `mlp` block by block, of what has not left
        whole. Attention may do that with its heads, an MLP with its hidden units.

        The gate of a stream's unit sits on what every reader sees. A norm feeds exactly one reader (or the classifiers
        together), so the gate gradients of its weight and bias add up to the readers' columns at a fraction of the
        cost.
        """
        blocks = self.stack(model)
        widths = [Width("emb", "emb", tuple(range(len(blocks))))]
        for i, block in enumerate(blocks):
            widths += [w for w in block_widths(f"blocks.{i}", i) if has(block, w.kind)]
        found = collect(model, widths, {"emb": self.embeddings(model)}, bundle_sizes)
        ends = {"heads": ("qk_dim", "v_dim"), "mlp": ()}
        return [
            replace(g, ends=tuple(f"{g.name.removesuffix(g.kind)}{kind}" for kind in ends[g.kind]))
            if g.kind in ends
            else g
            for g in found
        ]

    def parts(self, model: nn.Module) -> tuple[Part, ...]:
        """The attention and the MLP of every block, each with its norm and residual, and the rest of the model.

        Where tokens merge, blocks of as many make a part: `attention.181.16` has its merge of 16, `mlp.165` none.
        """
        blocks, merges = list(self.stack(model)), self.merges(model)
        attention, mlp = ("emb", "heads", "qk_dim", "v_dim"), ("emb", "mlp")
        rest = Part("rest", ("emb",), ((0,),))
        every, none = counts(self.tokens(model), merges), (None,) * (len(blocks) + 1)
        tokens, found = every if merges else none, {}
        for i, (block, r) in enumerate(zip(blocks, merges or (0,) * len(blocks), strict=True)):
            if has(block, "heads"):
                found.setdefault(("attention", attention, tokens[i], r), []).append(i)
            if has(block, "mlp"):
                found.setdefault(("mlp", mlp, tokens[i + 1], 0), []).append(i)
        return (
            *(
                Part(
                    name + f".{n}" * (n is not None) + f".{r}" * (r > 0),
                    kinds,
                    tuple((i,) * len(kinds) for i in mine),
                    n,
                    r,
                )
                for (name, kinds, n, r), mine in found.items()
            ),
            rest,
        )

    def part_macs(self, model: nn.Module, part: Part) -> Callable[..., int]:
        if part.name == "rest":
            return self.rest_macs(model)
        tokens, inside = part.tokens or self.tokens(model), list(self.stack(model).modules())
        if part.name.startswith("mlp"):
            matrices = 3 if any(isinstance(m, GatedMlp) for m in inside) else 2
            return lambda emb, hidden: tokens * matrices * emb * hidden
        dims = next(m for m in inside if isinstance(m, Attention)).span("qk_dim")
        return lambda emb, heads, qk, v: (
            tokens * heads * (emb * (2 * dims * qk + v) + v * emb + tokens * (dims * qk + v))
        )

    def sample_spec(self, spec: ViTSpec, part: Part, widths: Sequence[int]) -> ViTSpec:
        """One block that has `widths` along the axes of `part`, and elsewhere the widest of the model."""
        widest = BlockWidths(**{kind: max(getattr(b, kind) for b in spec.blocks) for kind in KINDS})
        block = replace(widest, **dict(zip(part.kinds, widths, strict=True)))
        return replace(spec, config={**spec.config, self.depth_key: 1}, blocks=(block,), merges=())

    def piece(self, model: nn.Module, part: Part) -> Piece:
        """The first block's attention or MLP; or the `rest`, images to logits, for which `model` loses its blocks."""
        if part.name == "rest":
            del self.stack(model)[:]
            return model, self.preprocess(model)["input_size"]
        attention, mlp = self.steps(model, part)
        shape = (part.tokens or self.tokens(model), self.emb(model))
        return mlp if part.name.startswith("mlp") else attention, shape
