"""What can be pruned and what was kept, as frozen data: slices, groups, block widths, the spec of a compact model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KINDS = ("emb", "heads", "qk_dim", "v_dim", "mlp")
"""The five prunable widths, in the order in which tables and width arrays hold them."""

TOKENS = "tokens"
"""What a recipe calls the tokens of an image, which merge where they are alike; no width of a table, see
`ViTSpec.merges`."""

TITLES = {"emb": "EMB", "heads": "heads", "qk_dim": "QK per head", "v_dim": "V per head", "mlp": "MLP"}
"""The five widths as the paper writes them."""

BUNDLE_SIZES: Mapping[str, int] = {"emb": 16, "heads": 2, "qk_dim": 8, "v_dim": 8, "mlp": 16}
"""Units that leave in one move, so that every remaining projection has sides divisible by 16."""


@dataclass(frozen=True)
class Slice:
    """The part of one parameter in which a group's units live.

    `rows` picks a span of dimension 0 (the query third of a fused qkv weight, say); what it picks is then seen as
    `view`, whose dimension `axis` counts the group's units. `view` splits dimensions and never joins them, so that a
    unit is always a set of whole indices of one dimension of the parameter.

    Attributes:
        scored: the saliency `hessian` sums over this slice: the gate sits where the unit leaves the network.
        published: the saliency of the published runs sums over this slice (criterion `nvit`).
    """

    name: str
    view: tuple[int, ...]
    axis: int
    rows: tuple[int, int] | None = None
    scored: bool = False
    published: bool = False

    def of(self, tensor):
        """`tensor` (the parameter or its gradient) cut to `rows` and seen as `view`; a view where strides allow."""
        part = tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]
        return part.reshape(self.view)


@dataclass(frozen=True)
class Group:
    """One prunable width at one place, as `blocks.0.mlp`, with every slice that shrinks when one of its units leaves.

    Attributes:
        kind: one of `KINDS`.
        size: number of units.
        multiple: units that leave in one move (a bundle).
        blocks: the blocks whose width this is: all of a residual stream for `emb`, one otherwise.
        divisor: what the published runs divide the gate gradient by before squaring, to make kinds comparable.
        ends: the groups that go to nothing with its last bundle, where that may leave: then a bias stays of what its
            layer gave. None where the last bundle never leaves.
    """

    name: str
    kind: str
    size: int
    multiple: int
    slices: tuple[Slice, ...]
    blocks: tuple[int, ...]
    divisor: float = 1.0
    ends: tuple[str, ...] | None = None

    @property
    def scored_slices(self) -> tuple[Slice, ...]:
        return tuple(s for s in self.slices if s.scored)

    @property
    def published_slices(self) -> tuple[Slice, ...]:
        return tuple(s for s in self.slices if s.published)


@dataclass(frozen=True)
class BlockWidths:
    """The five widths of one block; `qk_dim` and `v_dim` are per head. Without attention the three of it are 0, without
    MLP `mlp` is."""

    emb: int
    heads: int
    qk_dim: int
    v_dim: int
    mlp: int


def block_widths(groups: Sequence[Group], counts: Mapping[str, int]) -> tuple[BlockWidths, ...]:
    """Widths of every block when `counts[group.name]` units of each group are kept."""
    blocks: dict[int, dict[str, int]] = {}
    for g in groups:
        for b in g.blocks:
            blocks.setdefault(b, dict.fromkeys(KINDS, 0))[g.kind] = counts[g.name]
    return tuple(BlockWidths(**blocks[b]) for b in sorted(blocks))


@dataclass(frozen=True)
class Part:
    """Pieces of a model that cost the same at the same widths: the attention of every block of one stage, say.

    Attributes:
        name: as `attention`, `mlp`, `rest`; in a hierarchical model `attention.0`, `merge.1`.
        kinds: the kind of width along each axis. One may come twice: patch merging is `("emb", "emb")`, of the stage
            before and of its own.
        pieces: for every occurrence in the model, the block whose width each axis is. The attention of a ViT of two
            blocks is `((0, 0, 0, 0), (1, 1, 1, 1))`. A group is the width along one axis of a piece at most.
        tokens: that a piece works on, where tokens merge; None for the model's.
        merged: of which so many merge in it.
    """

    name: str
    kinds: tuple[str, ...]
    pieces: tuple[tuple[int, ...], ...]
    tokens: int | None = None
    merged: int = 0


FORMAT = 2
"""Of a snapshot's files, said in its `spec.json` and `manifest.json`. Raise it with whatever an older nvit would not
understand, and bring what came before up to it in `ViTSpec.from_json`. In format 1, spec.json did not say its own."""


class NewerFormat(ValueError):
    """What is read is of a format that only a later version knows; says both, without the file."""

    def __init__(self, found: int) -> None:
        super().__init__(
            f"was written by a newer nvit (format {found}), this one reads up to {FORMAT}; upgrade nvit to read it"
        )


def check_format(found: Any) -> None:
    """Raise ValueError unless a number of a format is one that this version reads; `NewerFormat` for a later one."""
    if type(found) is not int or found < 1:
        raise ValueError(f"its format is {str(found)[:20]!r}, expected a number of 1 to {FORMAT}")
    if found > FORMAT:
        raise NewerFormat(found)


_TYPES = {
    "family": str,
    "architecture": str,
    "config": dict,
    "blocks": list,
    "preprocess": dict,
    "name": str,
    "sparse": list,
    "kept": dict,
    "changes": dict,
    "merges": list,
    "labels": list,
}
"""What the fields of a spec are in JSON."""


@dataclass(frozen=True)
class ViTSpec:
    """Everything needed to rebuild a compact model without its training code, except the weights.

    Attributes:
        family: the adapter that built it, as `timm_vit`.
        architecture: the host's class, as `VisionTransformer`.
        config: constructor arguments of the *dense* host; attention keeps the dense model's logit scale.
        blocks: widths of each block, which replace the dense ones.
        preprocess: input size, mean, std, crop and interpolation, as timm's data config names them.
        name: the model's name in its library, for people.
        sparse: weights that are 2:4 sparse: at most two nonzeros of each four neighbours along the input.
        kept: by group, the dense model's units that are left, where it matters which: rotary pairs turn by frequencies
            of their own, heads look theirs up in a table that all blocks share.
        changes: by layer, what was changed in the model that the config builds: numbers of it (`scale`, `p`), and as
            `layer` which parameterless one stands there. See `adapters.changes`.
        merges: how many tokens merge in each block, between attention and MLP; empty where none do.
        labels: names of the classes, in the order of their numbers, where the model's head was made for them.
    """

    family: str
    architecture: str
    config: Mapping[str, Any]
    blocks: tuple[BlockWidths, ...]
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    sparse: tuple[str, ...] = ()
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    merges: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        for later in ("merges", "labels"):
            if not fields[later]:
                del fields[later]  # so that whoever knows of neither reads what needs none
        return json.dumps({"format": FORMAT} | fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ViTSpec:
        """Parse what `to_json` wrote, now or in an earlier format.

        Raises:
            NewerFormat: it is of a later one.
            ValueError: not JSON, a field missing, unknown or of another type, or a width that is none.
        """
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as e:
            raise ValueError(f"not valid JSON ({e.msg} at line {e.lineno})") from None
        except RecursionError:
            raise ValueError("not valid JSON (nested too deep)") from None
        if isinstance(raw, dict):
            check_format(raw.pop("format", 1))
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(raw, dict) or set(raw) | {"sparse", "kept", "changes", "merges", "labels"} != names:
            found = ", ".join(sorted(raw)) if isinstance(raw, dict) else type(raw).__name__
            raise ValueError(f"has the fields {found}; expected {', '.join(sorted(names))}")
        for name, kind in _TYPES.items():
            if not isinstance(raw.get(name, kind()), kind):
                raise ValueError(f"{name} is a {type(raw[name]).__name__}, expected {kind.__name__}")
        widths = {f.name for f in dataclasses.fields(BlockWidths)}
        for i, b in enumerate(raw["blocks"]):
            if not isinstance(b, dict) or set(b) != widths or not all(type(v) is int and v >= 0 for v in b.values()):
                raise ValueError(f"block {i} has widths {b}; expected whole numbers for {', '.join(KINDS)}")
            if not b["emb"] or len({b[kind] > 0 for kind in ("heads", "qk_dim", "v_dim")}) > 1:
                raise ValueError(f"block {i} has widths {b}; only all of its attention may be 0, or its mlp")
        blocks = tuple(BlockWidths(**b) for b in raw.pop("blocks"))
        sparse = tuple(str(name) for name in raw.pop("sparse", ()))
        kept = {str(name): tuple(units) for name, units in raw.pop("kept", {}).items()}
        if odd := next((name for name, change in raw.get("changes", {}).items() if not isinstance(change, dict)), None):
            raise ValueError(f"changes of {odd} are no object")
        merges = tuple(raw.pop("merges", ()))
        if not all(type(r) is int and r >= 0 for r in merges):
            raise ValueError(f"merges are {list(merges)[:4]}; expected a number of tokens for each block")
        labels = tuple(str(name) for name in raw.pop("labels", ()))
        return cls(blocks=blocks, sparse=sparse, kept=kept, merges=merges, labels=labels, **raw)
