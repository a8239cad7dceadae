"""Launches of the products under `mlp` and `swiglu`; shapes and roles: docs/kernels/mlp.md."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nvit_kernels.tuning import Tuned as tuned
from nvit_kernels.launch import FUSED_MULTIPLY_ADD, INTERPRET, eighths, matmul_precision
from nvit_kernels.ops.matmul.kernels import compact_kernel, scores_kernel, tokens_kernel, weights_kernel

ROWS = 128  # token rows per program: partial scores are laid out by it, so never tuned

tokens_tuned = tuned("tokens", tokens_kernel)
tokens_backward_tuned = tuned("tokens_backward", tokens_kernel)  # the backward epilogues hold more: narrower tiles
weights_tuned = tuned("weights", weights_kernel)


def tokens(a: Tensor, b: Tensor, index: Tensor | None, count: Tensor | None, *, role: str, kept: str, b_by: str,
           out: Tensor, out2: Tensor | None = None, out3: Tensor | None = None, aux: Tensor | None = None,
           aux2: Tensor | None = None, gather: bool = False, bias: Tensor | None = None, scores: Tensor | None = None,
           samples: int = 1) -> None:  # fmt: skip
    """The outs = role(a @ b + bias) for token rows a `(M, K)`, b `(N, K)` when `b_by` is n, `(K, N)` when it is k.

    `kept` names the width, n or k, that the list is for; `gather` reads b's rows through the list. With `scores`,
    float32 `(samples, N)`, each kept unit's Σ activation · ∂activation is added per sample. All are contiguous.
    """
    m, k = a.shape
    n = out.shape[1]
    n8, k8 = eighths("widths", n, k)
    rows = max(m // samples, 1)
    part = None if scores is None else a.new_empty(triton.cdiv(m, ROWS) + samples, n, dtype=torch.float32)
    kernel = tokens_backward_tuned if role.endswith("backward") else tokens_tuned
    kernel[lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, ROWS))](
        a=a, b=b, bias=None if bias is None else bias.contiguous(), out=out, out2=out2, out3=out3, aux=aux, aux2=aux2,
        part=part, index=index, count=count, M=m, N8=n8, K8=k8, TOKENS=rows, ROLE=role, B_BY=b_by, KEPT=kept,
        GATHER=gather, PRECISION=matmul_precision(), BLOCK_M=ROWS, **FUSED_MULTIPLY_ADD,
    )  # fmt: skip
    if scores is not None:
        scores_kernel[(triton.cdiv(n, 128), samples)](
            part=part, scores=scores, index=index, count=count, M=m, N=n, TOKENS=rows, ROWS=ROWS, BLOCK=128,
            **FUSED_MULTIPLY_ADD,
        )  # fmt: skip


def weights(a: Tensor, b: Tensor, out: Tensor, index: Tensor | None, count: Tensor | None, *, kept: str,
            sums: Tensor | None = None) -> None:  # fmt: skip
    """out `(M, N)` = aᵀ b over tokens, zeros at pruned units; `sums` `(M,)` = Σ over tokens of a."""
    (t, m), n = a.shape, b.shape[1]
    m8, n8 = eighths("widths", m, n)
    weights_tuned[lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"]))](
        a=a, b=b, out=out, sums=sums, index=index, count=count, T=t, M8=m8, N8=n8, KEPT=kept,
        PRECISION=matmul_precision(), **FUSED_MULTIPLY_ADD,
    )  # fmt: skip


def compact(w: Tensor, index: Tensor | None, count: Tensor | None) -> Tensor:
    """Kept columns of w `(rows, N)` side by side in a buffer of the same shape; w itself where all are kept."""
    if index is None:
        return w
    out, (rows, n) = torch.empty_like(w, memory_format=torch.contiguous_format), w.shape
    block, step = (1024, 1024) if INTERPRET else (256, 8)
    (n8,) = eighths("widths", n)
    compact_kernel[(triton.cdiv(n, block), triton.cdiv(rows, step))](
        w=w.contiguous(), out=out, index=index, count=count, rows=rows, N8=n8, ROWS=step, BLOCK=block,
        **FUSED_MULTIPLY_ADD,
    )  # fmt: skip
    return out
