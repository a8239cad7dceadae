"""An MLP by the vendor's products, with one pass of ours around each: bias and GELU, and in the backward ∂GELU with the
bias's gradient and the units' scores. Pruned units, where some are, are zeroed in those passes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nvit_kernels.launch import INTERPRET, on_device, power_of_two
from nvit_kernels.ops.fold import chunk_rows, fold, in_units
from nvit_kernels.ops.mlp.kernels import gelu_backward_kernel, gelu_kernel
from nvit_kernels.tuning import Launch

COLUMNS, FORWARD_ROWS = 128, 32  # of a program
LONGEST_CHUNK = 128


def backward_rows(planes: int) -> int:
    """Rows at a time of a backward pass: more sums, the planes of its partial sums, take more registers."""
    return 8 if planes > 2 else 16


def tile(width: int, rows: int) -> dict[str, int]:
    """Block sizes of a pass over `(rows, width)`."""
    if INTERPRET:  # time grows with the number of operations, so large blocks
        return dict(BLOCK_M=LONGEST_CHUNK, BLOCK_N=min(1024, power_of_two(width)))
    return dict(BLOCK_M=rows, BLOCK_N=COLUMNS, num_warps=4)


def forward_pass(kernel: object, rows: int, width: int) -> Launch:
    """The launch of a forward pass of a kernel over `(rows, width)`."""
    block = tile(width, FORWARD_ROWS)
    grid = (-(-width // block["BLOCK_N"]), -(-rows // block["BLOCK_M"]))
    return Launch(kernel, grid, dict(rows=rows, **in_units(width), **block))


def backward_pass(kernel: object, rows: int, width: int, samples: int, planes: int) -> tuple[Launch, tuple[int, ...]]:
    """The launch of a backward pass over `(samples, rows / samples, width)`, and the shape of its partial sums."""
    block = tile(width, backward_rows(planes))
    across = -(-width // block["BLOCK_N"])
    chunk = chunk_rows(rows, across, least=16, most=LONGEST_CHUNK)
    block["BLOCK_M"] = min(block["BLOCK_M"], chunk)
    tokens = rows // samples
    shape = (samples, -(-tokens // chunk), planes, width)
    fixed = dict(tokens=tokens, CHUNK=chunk, **in_units(width), **block)
    return Launch(kernel, (across, shape[1], samples), fixed), shape


@lru_cache(maxsize=1024)
def _forward_pass(rows: int, width: int) -> Launch:
    return forward_pass(gelu_kernel, rows, width)


@lru_cache(maxsize=1024)
def _backward_pass(rows: int, width: int, samples: int) -> tuple[Launch, tuple[int, ...]]:
    return backward_pass(gelu_backward_kernel, rows, width, samples, 2)


def of_each(scores: Tensor | None) -> bool:
    """Whether scores are of each sample and not of the batch."""
    return scores is not None and scores.dim() == 2


def samples_of(x: Tensor, scores: Tensor | None) -> int:
    """Samples that sums over tokens must keep apart: those of x where scores are of each, else one."""
    return x.shape[0] if of_each(scores) else 1


def launch(x, w1, b1, w2, b2, mask, saves: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output `(tokens, out)`, fc1's product without its bias, and the activation, both `(tokens, hidden)`.

    Args:
        x: `(tokens, in)`.
        mask: bool `(hidden,)`, True stays; None: all stay.
        saves: somebody will differentiate; otherwise the activation takes the product's place.
    """
    u = torch.mm(x, w1.t())
    a = torch.empty_like(u) if saves else u
    rows, width = u.shape
    with on_device(x):
        _forward_pass(rows, width)(u, None if b1 is None else b1.contiguous(), mask, a)
    return F.linear(a, w2, b2), u, a


def launch_backward(dy, x, u, a, w1, b1, w2, mask, scores, samples, wants):
    """Gradients of x `(tokens, in)`, w1, b1, w2, b2, None where `wants` says no; adds scores to the buffer given."""
    dx, dw1, db1, dw2, db2 = None, None, None, None, None
    rows, width = u.shape
    if wants[0] or wants[1] or wants[2] or scores is not None:
        du = torch.mm(dy, w2)  # ∂a, whose place ∂u takes
        sums = wants[2] or scores is not None
        run, shape = _backward_pass(rows, width, samples)
        part = u.new_empty(shape, dtype=torch.float32) if sums else None
        db1 = torch.empty_like(b1) if wants[2] else None
        with on_device(x):
            run(u, None if b1 is None else b1.contiguous(), mask, du, du, part)
            if sums:
                fold(*shape, of_each(scores))(part, db1, None, None, None, scores)
        dx = torch.mm(du, w1) if wants[0] else None
        dw1 = torch.mm(du.t(), x) if wants[1] else None
    dw2 = torch.mm(dy.t(), a) if wants[3] else None
    db2 = dy.sum(0) if wants[4] else None
    return dx, dw1, db1, dw2, db2
