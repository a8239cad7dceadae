"""Saliencies made of recorded gate gradients (`gate_samples`): by kind of width, place of the gate, and average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from nvit.criteria.fisher import SHRINK, leave_in_turn
from nvit.spec import KINDS

Samples = Mapping[str, Tensor]
DEPTH = 12


def gates(samples: Samples, kind: str, block: int, place: str = "leave", of: str = "true") -> Tensor:
    """Gate gradients `(samples, units)`, or `(samples, parts, units)` where a unit is looked at in parts."""

    def at(site: str) -> Tensor:
        return samples[f"{of}.{site}"]

    if kind == "mlp":
        return at(f"mlp.{block}" if place == "leave" else f"mlp_enter.{block}")
    if kind == "heads":
        qkv, v = at(f"qkv.{block}"), at(f"v.{block}")[:, 0]
        return {"leave": v.sum(2), "dims": v.transpose(1, 2), "enter": qkv.sum((1, 3))}[place]
    if kind in ("v_dim", "qk_dim"):
        by_head = at(f"v.{block}" if kind == "v_dim" else f"qkv.{block}")[:, 0]
        return by_head.sum(1) if place == "leave" else by_head
    site = {"leave": "norm", "sites": "norm", "norm_in": "norm_in", "writers": "write"}[place]
    every = torch.stack([at(f"{site}.{i}") for i in range(2 * DEPTH + 1)], 1)
    return every if place in ("sites", "writers") else every.sum(1)


def batch_squares(g: Tensor, size: int = 50, seed: int = 0) -> Tensor:
    """`hessian`: mean over shuffled batches of the squared batch mean."""
    order = torch.from_numpy(np.random.default_rng([seed, 0]).permutation(len(g)))
    whole = order[: len(g) // size * size].view(-1, size)
    return g[whole].mean(1).square().mean(0)


def expected_batch_squares(g: Tensor, size: int) -> Tensor:
    """Its expectation over all ways to draw a batch: E (Σ g / b)² from Σ g and Σ g²."""
    n, total, squares = len(g), g.double().sum(0), g.double().square().sum(0)
    return (squares / n / size + (size - 1) / size * (total.square() - squares) / (n * (n - 1))).float()


def in_turn(g: Tensor, shrink: float = SHRINK) -> Tensor:
    """`fisher`, with the shrinkage of different units' products in its hand."""
    g = g.double()
    return pairs_in_turn(g.T @ g / len(g), shrink)


def pairs_in_turn(pairs: Tensor, shrink: float) -> Tensor:
    """Units that leave one by one, from products of theirs `(units, units)`."""
    pairs = pairs.double()
    diagonal = pairs.diagonal().diag()
    return leave_in_turn((pairs - diagonal) * shrink + diagonal)


AVERAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "hessian": batch_squares,
    "expected hessian": lambda g: expected_batch_squares(g, 50),
    "one batch of all": lambda g: expected_batch_squares(g, len(g)),
    "squares": lambda g: g.square().mean(0),
    "root of squares": lambda g: g.square().mean(0).sqrt(),
    "abs": lambda g: g.abs().mean(0),
    "roots": lambda g: g.abs().sqrt().mean(0).square(),
    "fisher": in_turn,
    "fisher, not shrunk": lambda g: in_turn(g, 1.0),
}
"""By name, `(samples, units)` or `(samples, parts, units)` to the latter without samples."""


def _tokens(name: str) -> Callable[[Samples, str, int], Tensor]:
    """From sums over tokens where a unit leaves: of |activation · grad|, or activation² · grad² apart."""

    def score(samples: Samples, kind: str, block: int) -> Tensor:
        site = f"mlp.{block}" if kind == "mlp" else f"v.{block}"
        if name == "abs":
            unit = samples[f"tokens.abs.{site}"]
        else:
            unit = samples[f"tokens.energy.{site}"] * samples[f"tokens.grad2.{site}"]
        return unit if kind == "mlp" else unit.view(-1, 64).sum(1 if kind == "heads" else 0)

    return score


def _first_and_second(samples: Samples, kind: str, block: int) -> Tensor:
    """What the loss changes by to second order, -mean g + ½ mean of probes², not below 0."""
    first, second = (gates(samples, kind, block, of=of) for of in ("true", "probe"))
    return (second.square().mean(0) / 2 - first.mean(0)).clamp(min=0)


PLACES = {
    "emb": ("leave", "sites", "norm_in", "writers"),
    "heads": ("leave", "dims", "enter"),
    "qk_dim": ("leave", "heads"),
    "v_dim": ("leave", "heads"),
    "mlp": ("leave", "enter"),
}


EVERYWHERE = [("leave", name) for name in AVERAGES]
EVERYWHERE += [("leave", f"{name}, probe") for name in ("squares", "abs", "fisher", "fisher, not shrunk")]
EVERYWHERE += [("leave", "fisher, both"), ("leave", "second order")]
EVERYWHERE += [("tokens", "pairs"), ("tokens", "pairs, not shrunk")]
EVERYWHERE += [("leave", f"fisher, {passes}, toward pairs") for passes in ("probe", "both")]
"""Place and name of the saliencies that every kind has."""


def candidates(kind: str) -> list[tuple[str, str]]:
    """Place and name of every saliency of a kind, or of `all` kinds together."""
    own = [(place, "abs") for place in PLACES.get(kind, ())[1:]]
    own += [("tokens", name) for name in ("abs", "energies")] if kind in ("v_dim", "mlp") else []
    return EVERYWHERE + own


def _toward_pairs(samples: Samples, kind: str, block: int, passes: Sequence[str]) -> Tensor:
    """`fisher` shrunk by half toward the products of tokens instead of toward no products."""
    g = torch.cat([gates(samples, kind, block, of=of) for of in passes]).double()
    return pairs_in_turn((g.T @ g / len(g) + samples[f"pairs.{kind}.{block}"]) / 2, 1.0)


def score(samples: Samples, kind: str, place: str, name: str) -> dict[str, Tensor]:
    """Scores by group of one kind, `(units,)`."""
    assert kind in KINDS, kind
    out = {}
    for block in range(1 if kind == "emb" else DEPTH):
        if name == "second order":
            value = _first_and_second(samples, kind, block)
        elif name.startswith("pairs"):
            value = pairs_in_turn(samples[f"pairs.{kind}.{block}"], 1.0 if name.endswith("not shrunk") else SHRINK)
        elif name.endswith(", toward pairs"):
            passes = ("true", "probe") if ", both," in name else ("probe",)
            value = _toward_pairs(samples, kind, block, passes)
        elif place == "tokens":
            value = _tokens(name)(samples, kind, block)
        else:
            average, of = name, "true"
            for ending in ("probe", "both"):
                if name.endswith(f", {ending}"):
                    average, of = name.removesuffix(f", {ending}"), ending
            passes = ("true", "probe") if of == "both" else (of,)
            value = AVERAGES[average](torch.cat([gates(samples, kind, block, place, p) for p in passes]))
        out["emb" if kind == "emb" else f"blocks.{block}.{kind}"] = value.sum(0) if value.dim() == 2 else value
    return out
