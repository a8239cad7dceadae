"""Σ w·∂w of every unit of a whole model: one read of weights and gradients, three launches, no atomics.

Derivation and tables: docs/kernels/group_dot.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from nvit_kernels.launch import FUSED_MULTIPLY_ADD, INTERPRET, on_device
from nvit_kernels.ops.group_dot.kernels import outputs_kernel, slices_kernel, tiles_kernel
from nvit_kernels.ops.group_dot.plan import TILE_COLUMNS, TILE_ROWS, GroupDotPlan

TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
UNITS, LANES = (256, 64) if INTERPRET else (32, 64)  # of a reducing program: units, and elements of each at a time
BLOCK = 1024 if INTERPRET else 128  # outputs of an adding program


@lru_cache(maxsize=64)
def _pointer_table(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses on the device; keyed by them, so right as long as they are, and copied once while they stay."""
    table = torch.tensor(pointers, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@torch.library.custom_op("nvit::group_dot", mutates_args=())
def _group_dot(weights: list[Tensor], grads: list[Tensor], wide: Tensor | None, narrow: Tensor | None,
               reductions: Tensor, outputs: Tensor, contributions: Tensor, scale: Tensor, workspace: int,
               slice_sums: int, size: int) -> Tensor:  # fmt: skip
    for what, tensors in (("parameters", weights), ("gradients", grads)):
        dtypes = {t.dtype for t in tensors}
        if len(dtypes) > 1 or not dtypes <= TRITON_TYPES.keys():
            raise ValueError(f"{what} are {sorted(map(str, dtypes))}; one launch reads a single one of float32, "
                             "float16 and bfloat16, so make a plan per dtype")  # fmt: skip
    device = weights[0].device
    held = [t.contiguous() for pair in zip(weights, grads, strict=True) for t in pair]  # alive until launched
    pointers = _pointer_table(tuple(t.data_ptr() for t in held), device)
    space, sums, out = (torch.empty(n, dtype=torch.float32, device=device) for n in (workspace, slice_sums, size))
    out.zero_()  # ranges that no slice names
    rows = TILE_ROWS if INTERPRET else 8
    with on_device(weights[0]):
        for step, tiles in ((8, wide), (1, narrow)):
            if tiles is not None:
                tiles_kernel[(tiles.shape[0],)](
                    pointers=pointers, tiles=tiles, workspace=space, W=TRITON_TYPES[weights[0].dtype],
                    G=TRITON_TYPES[grads[0].dtype], STEP=step, ROWS=rows, BLOCK=TILE_COLUMNS, INTERPRETED=INTERPRET,
                    **FUSED_MULTIPLY_ADD,
                )  # fmt: skip
        slices_kernel[(reductions.shape[0],)](
            workspace=space, reductions=reductions, sums=sums, UNITS=UNITS, LANES=LANES, **FUSED_MULTIPLY_ADD
        )
        outputs_kernel[(outputs.shape[0],)](
            sums=sums, outputs=outputs, contributions=contributions, scale=scale, out=out, BLOCK=BLOCK,
            **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return out


@_group_dot.register_fake
def _(weights, grads, wide, narrow, reductions, outputs, contributions, scale, workspace, slice_sums, size):
    return weights[0].new_empty(size, dtype=torch.float32)


def group_dot(params: Mapping[str, Tensor], grads: Mapping[str, Tensor], plan: GroupDotPlan, *, scale=1.0) -> Tensor:
    """Fused `reference.group_dot`, which says what the arguments are. Bitwise repeatable."""
    plan.check(params, grads)
    weights, gradients = [params[n].detach() for n in plan.names], [grads[n].detach() for n in plan.names]
    device = weights[0].device
    t = plan.tables(device, UNITS, BLOCK)
    factor = scale if isinstance(scale, Tensor) else torch.full((1,), float(scale), device=device)
    return _group_dot(weights, gradients, t.tiles.get(8), t.tiles.get(1), t.reductions, t.outputs, t.contributions,
                      factor.to(device, torch.float32).reshape(1), t.workspace, t.slice_sums, plan.outputs)  # fmt: skip
