"""Alike tokens merged on a CPU by compiled code (`csrc/cpu/merge.h`), where it is built and no gradient is wanted."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from nvit_kernels import _native
from nvit_kernels.ops.merge_tokens.reference import check


@functools.cache
def operator() -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """The operator, with its shapes for fake tensors; None where the library is not built, or older than it."""
    if not _native.load().cpu or not hasattr(torch.ops.nvit, "_merge_tokens"):
        return None
    torch.library.register_fake("nvit::_merge_tokens", _fake)
    return torch.ops.nvit._merge_tokens.default


def _fake(x: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = x.shape
    total = x.new_empty(batch, tokens - r)
    return x.new_empty(batch, tokens - r, width), total, x.new_empty(batch, tokens, dtype=torch.int64)


def takes(x: Tensor, keys: Tensor, sizes: Tensor | None) -> bool:
    """Whether compiled code may merge the tokens of x: float32 on a CPU, and nobody differentiates or looks on.

    Whoever compiles, exports or traces, a dispatch mode (counting, fake tensors), a functional transform and a tensor
    of another class meet plain torch, every operation of which they know.
    """
    # Between two blocks all of this is cold, and each call costs microseconds: few calls, and cheap ones.
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (sizes is not None and sizes.requires_grad)):
        return False
    return _plain(x) and _plain(keys) and (sizes is None or _plain(sizes)) and operator() is not None


def _plain(t: Tensor) -> bool:
    return (type(t) is Tensor or type(t) is nn.Parameter) and t.is_cpu and t.dtype is torch.float32


def merge_tokens(
    x: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.merge_tokens` of what `takes` lets in."""
    try:
        return operator()(x, keys, sizes, r, prefix)
    except (RuntimeError, ValueError):
        check(x, keys, sizes, r, prefix)  # says what the operator, which looks at the same, refuses
        raise
