"""Launches of the products under `mlp` and `swiglu`; shapes and roles: docs/kernels/mlp.md."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nvit_kernels.launch import INTERPRET, eighths, matmul_precision, remember
from nvit_kernels.ops.matmul.kernels import compact_kernel, scores_kernel, tokens_kernel, weights_kernel
from nvit_kernels.tuning import Launch, Tuned, about

ROWS = 128  # token rows per program: partial scores are laid out by it, so never tuned

tokens_tuned = Tuned("tokens", tokens_kernel)
tokens_backward_tuned = Tuned("tokens_backward", tokens_kernel)  # the backward epilogues hold more: narrower tiles
weights_tuned = Tuned("weights", weights_kernel)
_launches: dict[tuple, Launch] = {}


def _there(*operands: Tensor | None) -> tuple[bool, ...]:
    return tuple(t is not None for t in operands)


def tokens(
    a: Tensor,
    b: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    *,
    role: str,
    kept: str,
    b_by: str,
    out: Tensor,
    out2: Tensor | None = None,
    aux: Tensor | None = None,
    aux2: Tensor | None = None,
    gather: bool = False,
    bias: Tensor | None = None,
    scores: Tensor | None = None,
    samples: int = 1,
) -> None:
    """The outs = role(a @ b + bias) for token rows a `(M, K)`, b `(N, K)` when `b_by` is n, `(K, N)` when it is k.

    `kept` names the width, n or k, that the list is for; `gather` reads b's rows through the list. With `scores`,
    float32 `(samples, N)`, each kept unit's Σ activation · ∂activation is added per sample. All are contiguous.
    """
    (m, k), n = a.shape, out.shape[1]
    rows, precision = max(m // samples, 1), matmul_precision()
    part = None if scores is None else a.new_empty(triton.cdiv(m, ROWS) + samples, n, dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    memory = (a, b, bias, out, out2, aux, aux2, part, index, count)
    kind = (role, b_by, kept, gather, n, k, precision, *_there(*memory))
    key = ("tokens", m, rows, a.dtype, a.device, *kind)
    run = _launches.get(key)
    if run is None:
        n8, k8 = eighths("widths", n, k)
        fixed = dict(M=m, N8=n8, K8=k8, TOKENS=rows, ROLE=role, B_BY=b_by, KEPT=kept, GATHER=gather,
                     PRECISION=precision, BLOCK_M=ROWS)  # fmt: skip
        tuned = tokens_backward_tuned if role.endswith("backward") else tokens_tuned
        run = remember(_launches, key, tuned.prepare(
            (about(m), *kind), a, lambda block: (triton.cdiv(n, block["BLOCK_N"]), triton.cdiv(m, ROWS)), fixed, memory
        ))  # fmt: skip
    run(*memory)
    if scores is not None:
        fixed = dict(M=m, N=n, TOKENS=rows, ROWS=ROWS, BLOCK=128)
        Launch(scores_kernel, (triton.cdiv(n, 128), samples), fixed)(part, scores, index, count)


def weights(a: Tensor, b: Tensor, out: Tensor, index: Tensor | None, count: Tensor | None, *, kept: str,
            sums: Tensor | None = None) -> None:  # fmt: skip
    """out `(M, N)` = aᵀ b over tokens, zeros at pruned units; `sums` `(M,)` = Σ over tokens of a."""
    (t, m), n = a.shape, b.shape[1]
    memory, precision = (a, b, out, sums, index, count), matmul_precision()
    kind = (kept, m, n, precision, *_there(*memory))
    key = ("weights", t, a.dtype, a.device, *kind)
    run = _launches.get(key)
    if run is None:
        m8, n8 = eighths("widths", m, n)
        fixed = dict(T=t, M8=m8, N8=n8, KEPT=kept, PRECISION=precision)
        run = remember(_launches, key, weights_tuned.prepare(
            (about(t), *kind), a, lambda block: (triton.cdiv(n, block["BLOCK_N"]), triton.cdiv(m, block["BLOCK_M"])),
            fixed, memory,
        ))  # fmt: skip
    run(*memory)


def compact(w: Tensor, index: Tensor | None, count: Tensor | None) -> Tensor:
    """Kept columns of w `(rows, N)` side by side in a buffer of the same shape; w itself where all are kept."""
    if index is None:
        return w
    out, (rows, n) = torch.empty_like(w, memory_format=torch.contiguous_format), w.shape
    block, step = (1024, 1024) if INTERPRET else (256, 8)
    (n8,) = eighths("widths", n)
    grid = (triton.cdiv(n, block), triton.cdiv(rows, step))
    Launch(compact_kernel, grid, dict(rows=rows, N8=n8, ROWS=step, BLOCK=block))(w.contiguous(), out, index, count)
    return out
