"""Σ w·∂w of every unit of a whole model: one read of weights and gradients, three launches, no atomics.

Derivation and tables: docs/kernels/group_dot.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from nvit_kernels.launch import INTERPRET, on_device, stays_one_operator
from nvit_kernels.ops.group_dot.kernels import outputs_kernel, slices_kernel, tiles_kernel
from nvit_kernels.ops.group_dot.plan import FEW, LONG, MANY, SHORT, TILE_COLUMNS, TILE_ROWS, GroupDotPlan
from nvit_kernels.tuning import Launch

TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
BLOCK = 1024 if INTERPRET else 128  # outputs of an adding program


@lru_cache(maxsize=64)
def _pointer_table(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses on the device; keyed by them, so right as long as they are, and copied once while they stay."""
    table = torch.tensor(pointers, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@lru_cache(maxsize=64)
def _tiles(programs: int, step: int, weights: torch.dtype, grads: torch.dtype) -> Launch:
    fixed = dict(W=TRITON_TYPES[weights], G=TRITON_TYPES[grads], STEP=step, ROWS=TILE_ROWS if INTERPRET else 8,
                 BLOCK=TILE_COLUMNS, INTERPRETED=INTERPRET)  # fmt: skip
    return Launch(tiles_kernel, (programs,), fixed)


@lru_cache(maxsize=64)
def _slices(programs: int) -> Launch:
    return Launch(slices_kernel, (programs,), dict(MANY=MANY, SHORT=SHORT, FEW=FEW, LONG=LONG))


@lru_cache(maxsize=64)
def _outputs(programs: int) -> Launch:
    return Launch(outputs_kernel, (programs,), dict(BLOCK=BLOCK))


def _one_dtype(what: str, tensors: Sequence[Tensor]) -> torch.dtype:
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1 or not dtypes <= TRITON_TYPES.keys():
        raise ValueError(f"{what} are {sorted(map(str, dtypes))}; one launch reads a single one of float32, "
                         "float16 and bfloat16, so make a plan per dtype")  # fmt: skip
    return dtypes.pop()


def launch(weights: Sequence[Tensor], grads: Sequence[Tensor], wide: Tensor | None, narrow: Tensor | None,
           reductions: Tensor, outputs: Tensor, contributions: Tensor, scale: Tensor, workspace: int, slice_sums: int,
           size: int) -> Tensor:  # fmt: skip
    """Sums `(size,)` from the tables of a plan.

    Raises:
        ValueError: dtypes are mixed.
    """
    dtypes = _one_dtype("parameters", weights), _one_dtype("gradients", grads)
    device = reductions.device
    held = [t if t.is_contiguous() else t.contiguous() for pair in zip(weights, grads, strict=True) for t in pair]
    pointers = _pointer_table(tuple([t.data_ptr() for t in held]), device)  # `held` lives until the launch
    space, sums = reductions.new_empty(workspace, dtype=torch.float32), scale.new_empty(slice_sums)
    out = scale.new_zeros(size)  # zeros where no slice names a range
    with on_device(scale):
        for step, tiles in ((8, wide), (1, narrow)):
            if tiles is not None:
                _tiles(tiles.shape[0], step, *dtypes)(pointers, tiles, space)
        _slices(reductions.shape[0])(space, reductions, sums)
        _outputs(outputs.shape[0])(sums, outputs, contributions, scale, out)
    return out


@torch.library.custom_op("nvit::group_dot", mutates_args=())
def operator(weights: list[Tensor], grads: list[Tensor], wide: Tensor | None, narrow: Tensor | None,
             reductions: Tensor, outputs: Tensor, contributions: Tensor, scale: Tensor, workspace: int,
             slice_sums: int, size: int) -> Tensor:  # fmt: skip
    """The same for torch.compile and export."""
    return launch(weights, grads, wide, narrow, reductions, outputs, contributions, scale, workspace, slice_sums, size)


@operator.register_fake
def _(weights, grads, wide, narrow, reductions, outputs, contributions, scale, workspace, slice_sums, size):
    return weights[0].new_empty(size, dtype=torch.float32)


def group_dot(params: Mapping[str, Tensor], grads: Mapping[str, Tensor], plan: GroupDotPlan, *, scale=1.0) -> Tensor:
    """Fused `reference.group_dot`, which says what the arguments are. Bitwise repeatable."""
    plan.check(params, grads)
    weights, gradients = [params[n] for n in plan.names], [grads[n] for n in plan.names]
    device = weights[0].device
    t = plan.tables(device, BLOCK)
    factor = scale if isinstance(scale, Tensor) else torch.full((1,), float(scale), device=device)
    sizes = (factor.to(device, torch.float32).reshape(1), t.workspace, t.slice_sums, plan.outputs)
    tables = (t.tiles.get(8), t.tiles.get(1), t.reductions, t.outputs, t.contributions)
    if stays_one_operator(weights[0], gradients[0]):
        weights, gradients = [w.detach() for w in weights], [g.detach() for g in gradients]
        return operator(weights, gradients, *tables, *sizes)
    with torch.no_grad():
        return launch(weights, gradients, *tables, *sizes)
