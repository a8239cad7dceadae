"""Other people's attention, each as `call(q, k, v, scale)` of `(batch, heads, tokens, dim)` tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from importlib import import_module

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import SkipProvider
from benchmarks.kernels.calls import compiled

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
FLASH = {"FlashAttention-3": "flash_attn_interface", "FlashAttention-4": "flash_attn.cute"}
"""Packages by name, where they are installed."""


def sdpa(backend: SDPBackend | None = None, pad: int = 0) -> Callable:
    """torch's attention with one backend; with `pad`, heads are zero-padded to that many dims, as flash wants them."""

    def call(q, k, v, scale):
        width = v.shape[-1]
        if pad:
            q, k, v = (F.pad(t, (0, pad - t.shape[-1])) for t in (q, k, v))
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :width]

    return call


def flex(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention)(q, k, v, scale=scale)


def flash(package: str) -> Callable:
    """FlashAttention from its own package; it wants tokens before heads, which is how ours lie in memory."""

    def call(q, k, v, scale):
        if not q.is_cuda:
            raise SkipProvider("FlashAttention needs a GPU")
        try:
            attention = import_module(package).flash_attn_func
        except ImportError as missing:
            raise SkipProvider(f"{package} is not installed ({missing})") from None
        out = attention(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale=scale)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def biased_sdpa(backend: SDPBackend | None = None) -> Callable:
    """torch's attention on one mask of all windows and heads, which every call has to make."""

    def call(q, k, v, bias, mask, scale):
        added = bias.to(q.dtype).unsqueeze(0)
        if mask is not None:
            added = added + mask.to(q.dtype).unsqueeze(1).repeat(len(q) // len(mask), 1, 1, 1)
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)

    return call


def biased_flex(q, k, v, bias, mask, scale):
    from torch.nn.attention.flex_attention import flex_attention

    def of_head(score, b, h, m, n):
        return score + bias[h, m, n]

    def of_head_and_window(score, b, h, m, n):
        return score + bias[h, m, n] + mask[b % len(mask), m, n]

    return compiled(flex_attention)(q, k, v, of_head if mask is None else of_head_and_window, scale=scale)


def sdpa_calls(width: int) -> dict[str, Callable]:
    """Every way that torch has, and padded to a multiple of 64 dims; `width` is the widest head dim."""
    padded = -(-width // 64) * 64
    calls = {"sdpa": sdpa(), f"sdpa padded to {padded}": sdpa(pad=padded)}
    return calls | {label: sdpa(backend) for label, backend in BACKENDS.items()}


def biased_calls() -> dict[str, Callable]:
    """Every way that torch has, with a bias."""
    calls: dict[str, Callable] = {"sdpa": biased_sdpa()}
    calls |= {label: biased_sdpa(backend) for label, backend in BACKENDS.items()}
    return calls | {"flex_attention": biased_flex}


def flash_calls() -> dict[str, Callable]:
    return {label: flash(package) for label, package in FLASH.items()}
