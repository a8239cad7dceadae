"""Which widths of pruned models survive, block by block (arXiv:2110.04869, Fig. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..spec import KINDS, TITLES, BlockWidths
from ..utils.style import BEHIND, line
from .figure import PIXELS, legend_below, panels, whole_numbers


def width_rows(
    models: Mapping[str, Sequence[BlockWidths]], tokens: Mapping[str, Sequence[int]] | None = None
) -> list[dict[str, Any]]:
    """One row per model and block: `model, block, emb, heads, qk_dim, v_dim, mlp`, and where tokens of any model merge,
    `tokens`: how many leave the block.

    Args:
        tokens: by model, how many enter its first block and leave each; empty where blocks differ in that.
    """
    rows = [
        {"model": name, "block": i} | {kind: getattr(widths, kind) for kind in KINDS}
        for name, blocks in models.items()
        for i, widths in enumerate(blocks)
    ]
    if merging(tokens):
        for row in rows:
            counted = tokens[row["model"]]
            row["tokens"] = counted[1 + row["block"]] if counted else None
    return rows


def spans(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per model of the rows that `width_rows` gives, for people: each width as `64`, or `16 – 24` over its
    blocks."""
    found = []
    for name in dict.fromkeys(r["model"] for r in rows):
        mine, line = [r for r in rows if r["model"] == name], {"name": name}
        for kind in KINDS:
            least, most = (choose(r[kind] for r in mine) for choose in (min, max))
            line[kind] = f"{least}" if least == most else f"{least} – {most}"
        found.append(line)
    return found


def merging(tokens: Mapping[str, Sequence[int]] | None) -> bool:
    """Whether tokens of any model merge."""
    return any(counted[0] != counted[-1] for counted in (tokens or {}).values() if counted)


def plot_widths(
    models: Mapping[str, Sequence[BlockWidths]],
    path: Path | str,
    dense: Sequence[BlockWidths] | None = None,
    pixels: int = PIXELS,
    tokens: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """A panel per width, a line per model, over the blocks, counted from 1; and one of tokens where any merge.

    Args:
        dense: what all of them were cut from, as bars behind.
        tokens: as in `width_rows`.
    """
    depth = max(map(len, (*models.values(), dense or ())))
    titles = dict(TITLES) | ({"tokens": "tokens"} if merging(tokens) else {})
    with panels(len(titles), path, pixels=pixels) as axes:
        shown: dict[str, Any] = {}
        for panel, (kind, title) in zip(axes, titles.items(), strict=True):
            by_model = {
                name: list(tokens[name][1:]) if kind == "tokens" else [getattr(b, kind) for b in blocks]
                for name, blocks in models.items()
            }
            whole = [
                getattr(b, kind) if kind in KINDS else max(c for counted in tokens.values() for c in counted)
                for b in dense or ()
            ]
            if dense is not None:
                shown["dense"] = panel.bar(range(1, len(whole) + 1), whole, width=0.8, color=BEHIND, zorder=1)
            for i, (name, values) in enumerate(by_model.items()):
                (drawn,) = panel.plot(range(1, len(values) + 1), values, **line(i), markersize=3.5, zorder=2)
                shown["/".join(Path(name).parts[-2:])] = drawn
            most = max(v for values in (*by_model.values(), whole) for v in values)
            panel.set(title=title, xlabel="block", xlim=(0.4, depth + 0.6), ylim=(0, 1.12 * most))
            panel.grid(axis="x", visible=False)
            whole_numbers(panel.xaxis)
            whole_numbers(panel.yaxis, min(6, most + 1))
        legend_below(axes[0], shown)
