"""Which sums `group_dot` makes: declared slices, laid out once as tables that three launches read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ROWS, TILE_COLUMNS = 64, 256  # of a parameter, per program of the first launch
MANY, SHORT = 128, 16  # units of a program of the second launch, and partial sums of each at a time
FEW, LONG = 16, 128  # the same where units have more partial sums, side by side


@dataclass(frozen=True)
class DotSlice:
    """Units along `axis` of rows `start:stop` of a parameter seen as `view`; their sums are added at `offset`.

    `start:stop` cuts the first dim of the parameter, or the whole of it where `stop` is None. A fused qkv weight gives
    its q heads as `DotSlice("qkv.weight", 0, 768, (12, 64, 768), 0, offset)` and its q dims with axis 1.
    """

    name: str
    start: int
    stop: int | None
    view: tuple[int, ...]
    axis: int
    offset: int

    @property
    def units(self) -> int:
        return self.view[self.axis]


class GroupDotPlan:
    """Slices of a whole model, checked against its shapes; build it once, it does not depend on masks.

    Args:
        slices: output ranges `offset : offset + units` must be equal or disjoint; equal ones are summed.
        shapes: of every parameter named, for example `{n: p.shape for n, p in model.named_parameters()}`.

    Raises:
        KeyError: a slice names no parameter.
        ValueError: a view does not fit its rows, or mixes rows and columns, or output ranges overlap in part.
    """

    def __init__(self, slices: Iterable[DotSlice], shapes: Mapping[str, Iterable[int]]):
        self.slices = tuple(_closed(s, shapes) for s in slices)
        if not self.slices:
            raise ValueError("a plan needs at least one slice")
        self.names = tuple(dict.fromkeys(s.name for s in self.slices))
        self.shapes = {name: tuple(shapes[name]) for name in self.names}
        self.outputs = max(s.offset + s.units for s in self.slices)
        self._tables: dict[torch.device, Tables] = {}

    def check(self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        """Raise unless every parameter and gradient is there, with the shape the plan was made for."""
        for name, shape in self.shapes.items():
            if name not in params:
                raise KeyError(f"the plan names {name}, which is not among the {len(params)} parameters given")
            if grads.get(name) is None:
                raise KeyError(f"{name} has no gradient; it is frozen, or not used in the loss")
            for what, t in (("parameter", params[name]), ("gradient", grads[name])):
                if t.shape != shape:
                    raise ValueError(f"{what} {name} has shape {tuple(t.shape)}, the plan was made for {shape}")

    def tables(self, device: torch.device, block: int = 128) -> Tables:
        """The launch tables on `device`, made at the first call, for programs of `block` outputs."""
        if device not in self._tables:
            made = lay_out(self, device, block)
            if type(made.outputs) is not Tensor:  # a fake device's, which would be of no use to a real one
                return made
            self._tables[device] = made
        return self._tables[device]


def _closed(s: DotSlice, shapes: Mapping[str, Iterable[int]]) -> DotSlice:
    if s.name not in shapes:
        raise KeyError(f"a slice names {s.name}, which is not among the {len(shapes)} parameters given")
    shape = tuple(shapes[s.name])
    stop = shape[0] if s.stop is None else s.stop
    if not 0 <= s.start < stop <= shape[0]:
        raise ValueError(f"{s.name}: rows {s.start}:{stop} are not within its {shape[0]} rows")
    if math.prod(s.view) != (stop - s.start) * math.prod(shape[1:]):
        raise ValueError(f"{s.name}: rows {s.start}:{stop} of {shape} cannot be viewed as {s.view}")
    if not 0 <= s.axis < len(s.view):
        raise ValueError(f"{s.name}: view {s.view} has no axis {s.axis}")
    return DotSlice(s.name, s.start, stop, tuple(s.view), s.axis, s.offset)


@dataclass(frozen=True)
class Tables:
    """What the launches read, all on one device.

    A parameter is a matrix `(rows, columns)`, cut into tiles at every declared row boundary. The first launch leaves a
    sum per (row, column tile) and per (row tile, column) in a workspace; the second reduces each slice's part of it,
    seen as `(outer, units, inner)`, to its units; the third adds up the slices of each output.
    """

    tiles: dict[int, Tensor]  # by widest common step, 8 or 1: int64 (n, 7), see group_dot.tiles_kernel
    reductions: Tensor  # int64 (n, 6): workspace offset, outer, units, inner, place among the slice sums, first unit
    outputs: Tensor  # int64 (n, 5): output offset, units, first and last contribution, first unit
    contributions: Tensor  # int64: places among the slice sums, by output
    workspace: int
    slice_sums: int


def units_at_once(outer: int, inner: int) -> int:
    """Units of a program of the second launch, by their partial sums; `slices_kernel` has a case for each."""
    return MANY if inner == 1 or outer * inner <= SHORT else FEW


def lay_out(plan: GroupDotPlan, device: torch.device, output_step: int) -> Tables:
    """Make the tables of `plan`; a program of the third launch has `output_step` units."""
    tiles: dict[int, list[tuple[int, ...]]] = {8: [], 1: []}
    base, places = 0, {}
    for number, name in enumerate(plan.names):
        mine = [s for s in plan.slices if s.name == name]
        rows, columns = _matrix(plan.shapes[name], mine)
        per_row = math.prod(plan.shapes[name]) // plan.shapes[name][0]  # elements of one row of the first dim
        cuts = (
            {0, rows} if rows == 1 else {0, rows} | {at * per_row // columns for s in mine for at in (s.start, s.stop)}
        )
        starts = [r for lo, hi in _pairs(sorted(cuts)) for r in range(lo, hi, TILE_ROWS)]
        bounds = _pairs([*starts, rows])
        across = -(-columns // TILE_COLUMNS)
        row_base, column_base = base, base + rows * across
        base = column_base + len(bounds) * columns
        places[name] = (rows, columns, across, starts, row_base, column_base)
        step = 8 if columns % 8 == 0 else 1
        for i, (lo, hi) in enumerate(bounds):
            for j in range(across):
                tiles[step].append((number, lo, hi, j, columns // step, row_base, column_base + i * columns))
    reductions, by_output, done = [], {}, 0
    for s in plan.slices:
        where = _reduction(s, plan.shapes[s.name], *places[s.name])
        _, outer, units, inner = where
        reductions += [(*where, done, u) for u in range(0, units, units_at_once(outer, inner))]
        by_output.setdefault((s.offset, s.units), []).append(done)
        done += s.units
    _check_disjoint(sorted(by_output))
    outputs, contributions = [], []
    for (offset, units), parts in sorted(by_output.items()):
        span = (len(contributions), len(contributions) + len(parts))
        outputs += [(offset, units, *span, u) for u in range(0, units, output_step)]
        contributions += parts

    def table(x):
        return torch.tensor(x, dtype=torch.int64, device=device)

    return Tables({step: table(t) for step, t in tiles.items() if t}, table(reductions), table(outputs),
                  table(contributions), base, done)  # fmt: skip


def _matrix(shape: tuple[int, ...], slices: list[DotSlice]) -> tuple[int, int]:
    """(rows, columns) of a parameter such that each view's dims fall into leading row dims and trailing column dims."""
    total = math.prod(shape)
    if len(shape) == 1 or total == shape[0]:
        return 1, total  # a vector: its products are the column sums of a single row
    suffixes = [{math.prod(s.view[i:]) for i in range(len(s.view) + 1)} for s in slices]
    for columns in (shape[-1], math.prod(shape[1:])):
        whole = all(math.prod(shape[1:]) % columns == 0 or s.stop - s.start == shape[0] for s in slices)
        if whole and all(columns in found for found in suffixes):
            return total // columns, columns
    raise ValueError(f"{slices[0].name} {shape}: views {[s.view for s in slices]} do not split into rows and columns "
                     f"of {shape[-1]} or {math.prod(shape[1:])} elements")  # fmt: skip


def _reduction(s, shape, rows, columns, across, starts, row_base, column_base) -> tuple[int, int, int, int]:
    """(workspace offset, outer, units, inner) of the partial sums whose total is the slice's."""
    outer, inner = math.prod(s.view[: s.axis]), math.prod(s.view[s.axis + 1 :])
    first = s.start * (math.prod(shape) // shape[0])  # element at which the slice begins
    if rows == 1:
        return column_base + first, outer, s.units, inner
    row_dims, length = 0, 1
    while length * columns < math.prod(s.view):
        length, row_dims = length * s.view[row_dims], row_dims + 1
    if s.axis < row_dims:  # rows: each has a sum per column tile
        return row_base + first // columns * across, outer, s.units, inner // columns * across
    top, end = first // columns, first // columns + length
    mine = [i for i, r in enumerate(starts) if top <= r < end]  # row tiles never straddle a slice's boundary
    return column_base + mine[0] * columns, len(mine) * (outer // length), s.units, inner


def _pairs(x: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(x))


def _check_disjoint(ranges: list[tuple[int, int]]) -> None:
    for (a, n), (b, m) in _pairs(ranges):
        if a + n > b:
            raise ValueError(f"outputs {a}:{a + n} and {b}:{b + m} overlap in part; a unit belongs to one group")
